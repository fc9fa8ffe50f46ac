"""A mistake is answered before anything is written or imported: where, what was given, what is expected."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from bad_preferences import PREFERENCES
from bad_recipes import CASES as OTHERS
from bad_recipes import Bad, build
from bad_rewards import REWARDS
from bad_streaming import STREAMING
from helpers.recipes import SOUND

from hfstrat import errors
from hfstrat.cli import check, main
from hfstrat.recipe.load import load_recipe
from hfstrat.run import launch, preflight

Usage = namedtuple("Usage", "total used free")
NAMED_TWICE = re.compile(r"\b([a-z_]{3,})\.\1\b(?! = )|(?:^|\s)([a-z_.]+): \2: ")  # a key or its section
CASES = [*OTHERS, *PREFERENCES, *REWARDS, *STREAMING]
Snapshot = dict[str, tuple[int, int]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """`answer(case, command)` gives the exit code, what was printed, and the folder before and after."""

    def started(*_: Any) -> None:
        raise AssertionError("this was not refused")

    monkeypatch.setattr(launch, "start", started)
    monkeypatch.setattr(check, "show", started)
    monkeypatch.chdir(tmp_path)

    def run(case: Bad, command: str) -> tuple[Any, str, Snapshot, Snapshot]:
        build(case, tmp_path)
        if case.free is not None:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(case.free, 0, case.free))
        monkeypatch.setattr(sys, "argv", ["hfstrat", command, case.recipe, *case.overrides])
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main.main()
        printed = capfd.readouterr()
        return ended.value.code, printed.out + printed.err, before, snapshot(tmp_path)

    return run


def snapshot(folder: Path) -> Snapshot:
    """Every path with its size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.slow), "check"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_answered(answer: Any, case: Bad, command: str) -> None:
    code, printed, before, after = answer(case, command)
    assert code == errors.USER
    assert "Traceback" not in printed
    assert any(line.startswith(case.at) for line in printed.splitlines()), printed
    missing = [fragment for fragment in case.message if fragment not in printed]
    assert not missing, printed
    assert not NAMED_TWICE.search(printed), printed
    assert before == after


def test_the_corpus_is_a_corpus() -> None:
    """Each case has a name of its own, a message, and is wrong in some way."""
    assert len(CASES) >= 65
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.message for case in CASES)


def test_the_sound_recipe_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cases are made from is refused by nothing, so each is refused for its own mistake."""
    build(Bad("sound", "", [], text=SOUND), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert preflight.check(load_recipe("recipe.yaml")) is not None


ALONE = """
import os, shutil, sys, tempfile
from collections import namedtuple
from pathlib import Path
from bad_recipes import CASES, build
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.run import preflight

usage, real = namedtuple("Usage", "total used free"), shutil.disk_usage
for case in CASES:
    with tempfile.TemporaryDirectory() as folder:
        build(case, Path(folder))
        os.chdir(folder)
        shutil.disk_usage = real if case.free is None else lambda _: usage(0, 0, case.free)
        try:
            preflight.check(load_recipe(case.recipe, case.overrides))
        except UserError:
            continue
        finally:
            os.chdir("/")
    raise SystemExit(f"not refused: {case.name}")
loaded = {"torch", "transformers", "datasets", "peft", "accelerate"} & set(sys.modules)
raise SystemExit(f"imported: {sorted(loaded)}" if loaded else 0)
"""


def test_no_mistake_needs_torch() -> None:
    """Every case is refused in a process that has imported neither torch nor a library that needs it."""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
