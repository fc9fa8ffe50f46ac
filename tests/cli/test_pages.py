"""The pages "own data in five minutes" are followed to the letter, from an empty folder; the snippets of Python are run.

Hub ids are replaced by tiny random models, and times by a number of steps.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.classifiers import make_encoder
from helpers.images import make_image_model
from helpers.runs import run as run_recipe

from hfstrat.cli import main
from hfstrat.recipe.load import load_recipe
from hfstrat.run import launch

ROOT = Path(__file__).parents[2]
CHAT, ENCODER, VISION = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2", "facebook/dinov2-small"
INTERACTIVE = ("hfstrat chat", "hfstrat tune")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """A tiny model for each Hub id of the pages."""
    folder = tmp_path_factory.mktemp("hub")
    return {
        CHAT: tiny,
        ENCODER: make_encoder(folder / "encoder", "bert"),
        VISION: make_image_model(folder / "vision", "dinov2"),
    }


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs a command line of `hfstrat` in an empty folder; returns its output. A failure fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "start", train_here)

    def run(line: str) -> str:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        try:
            main.main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code
        printed = capfd.readouterr()
        assert code in (0, None), f"{line}: exit code {code}\n{printed.out}\n{printed.err}"
        return printed.out + printed.err

    return run


def train_here(started: launch.Launch) -> int:
    """Train in this process, which `hfstrat train` would replace."""
    recipe, *overrides = started.command[started.command.index("hfstrat.train") + 1 :]
    run_recipe(load_recipe(recipe, overrides))
    return 0


def steps(page: str, replaced: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """The files to write and the lines to run, in the order of the page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for hub_id, folder in replaced.items():
        text = text.replace(hub_id, str(folder))
    text = text.replace("max_time: 3min", "max_steps: 3")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language:
            yield block.partition("\n")[0].removeprefix("# "), block
        else:
            yield from (("", line) for line in block.splitlines() if line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "result", "says"),
    [
        ("start_chat", "runs/chat/final/adapter_model.safetensors", "verified  "),
        ("start_classification", "runs/classify/final", "accuracy"),
        ("start_preferences", "runs/prefer/final/adapter_model.safetensors", "reward"),
        ("start_images", "runs/pictures/final/config.json", "accuracy"),
    ],
)
def test_a_page_can_be_followed(
    stand_ins: dict[str, Path], command: Callable[[str], str], tmp_path: Path, page: str, result: str, says: str
) -> None:
    printed = ""
    for name, content in steps(page, stand_ins):
        if name:
            (tmp_path / name).write_text(content, encoding="utf-8")
        elif content.startswith("python "):
            runpy.run_path(content.split()[1])
        elif not content.startswith(INTERACTIVE):
            printed += command(content)
    assert (tmp_path / result).exists()
    assert says in printed


@pytest.mark.slow
def test_the_snippets_of_python_run(
    stand_ins: dict[str, Path], command: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of python.md and of the skill, and the one of use.md that loads an adapter of a local base."""
    rows = [{"prompt": f"question {number}", "completion": "an answer"} for number in range(24)]
    for page, text in (("python", (ROOT / "docs" / "python.md").read_text()), ("skill", command("hfstrat skill"))):
        snippet = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0]
        for named in (CHAT, "MODEL"):
            snippet = snippet.replace(f'"{named}"', repr(str(stand_ins[CHAT])))
        snippet = snippet.replace('"runs/mine"', f'"runs/{page}"').replace('"num_train_epochs": 1', '"max_steps": 2')
        found: dict[str, Any] = {"rows": rows}
        exec(compile(snippet.replace('"max_steps": 100', '"max_steps": 2'), page, "exec"), found)
        assert found["run"].metrics["loss"] > 0
    loads = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "use.md").read_text(encoding="utf-8"), re.M | re.S)
    snippet = next(text for text in loads if "path/to/the/base" in text)
    snippet = snippet.replace("path/to/the/base", str(stand_ins[CHAT])).replace("me/my-adapter", "runs/python/final")
    found = {}
    exec(compile(snippet, "use", "exec"), found)
    assert found["model"].peft_config
