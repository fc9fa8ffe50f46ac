"""`hfstrat migrate` and `hfstrat skill` as commands: what is printed where, and what is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfstrat.cli import main
from hfstrat.recipe.load import load_recipe

CONFIG = """
base_model: acme/base
micro_batch_size: 2
num_epochs: 1
learning_rate: 2e-4
datasets: [{path: d.jsonl}]
lisa_n_layers: 4
"""
Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def hfstrat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """`hfstrat("migrate", ...)` gives the exit code, the output and the error output, from a folder with `theirs.yaml`."""
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(CONFIG, encoding="utf-8")

    def run(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["hfstrat", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        printed = capfd.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_the_recipe_is_printed_and_the_notes_are_apart(hfstrat: Run) -> None:
    """So that `hfstrat migrate theirs.yaml > recipe.yaml` writes a recipe."""
    code, out, err = hfstrat("migrate", "theirs.yaml")
    assert not code
    assert load_recipe("recipe.yaml", (), out).recipe.model.name_or_path == "acme/base"
    assert yaml.safe_load(out)["strategy"] == "full"
    assert "theirs.yaml: read as a config of axolotl" in err
    assert "no counterpart in a recipe:\n  lisa_n_layers" in err


def test_a_recipe_is_written_once(hfstrat: Run, tmp_path: Path) -> None:
    code, out, err = hfstrat("migrate", "theirs.yaml", "seed=7", "--num-processes", "4", "-o", "mine.yaml")
    assert (code, out) == (0, "")
    assert "mine.yaml is valid; `hfstrat check mine.yaml`" in err
    recipe = load_recipe(str(tmp_path / "mine.yaml")).recipe
    assert (recipe.seed, recipe.training.global_batch_size) == (7, 8)
    before = (tmp_path / "mine.yaml").read_bytes()
    code, _, err = hfstrat("migrate", "theirs.yaml", "-o", "mine.yaml")
    assert code == 2
    assert "--output: mine.yaml exists already" in err
    assert (tmp_path / "mine.yaml").read_bytes() == before
    assert hfstrat("migrate", "theirs.yaml", "-o", "none/mine.yaml")[0] == 2


def test_an_unknown_format_is_refused_and_nothing_is_written(hfstrat: Run, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("a: 1\nb: 2\n")
    code, out, err = hfstrat("migrate", "odd.yaml", "-o", "mine.yaml")
    assert (code, out) == (2, "")
    assert "of no format that is known" in err
    assert "Traceback" not in err
    assert not (tmp_path / "mine.yaml").exists()


def test_a_config_in_place_of_a_recipe_is_recognized(hfstrat: Run) -> None:
    for words in (("train", "theirs.yaml"), ("check", "theirs.yaml")):
        code, _, err = hfstrat(*words)
        assert code == 2
        assert err.splitlines()[-1].endswith("this looks like a config of axolotl: `hfstrat migrate theirs.yaml` converts it")


def test_the_skill_is_that_of_the_package(hfstrat: Run) -> None:
    folder = Path(main.__file__).parents[1] / "assistants"
    assert hfstrat("skill")[1] == (folder / "SKILL.md").read_text(encoding="utf-8")
    assert hfstrat("skill", "--llms")[1] == (folder / "llms.txt").read_text(encoding="utf-8")
    front = yaml.safe_load((folder / "SKILL.md").read_text(encoding="utf-8").split("---")[1])
    assert set(front) == {"name", "description"}
    assert len(front["description"]) <= 1024


def test_neither_imports_torch() -> None:
    lines = [
        "import sys, hfstrat.cli.main, hfstrat.recipe.migration.convert",
        "assert not {'torch', 'transformers'} & set(sys.modules)",
    ]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == 0
