"""Sentences of the commands that depend on a number, a terminal or a place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.page_reports import report

from hfstrat import errors
from hfstrat.cli import inference
from hfstrat.evaluation import evaluate as evaluation
from hfstrat.evaluation.intervals import ROWS
from hfstrat.pages.blocks import BAD, GOOD, UNCLEAR
from hfstrat.recipe.format import plural
from hfstrat.recipe.schema import Recipe
from hfstrat.run import verdict
from hfstrat.run.train import FEW_STEPS, _remedy
from hfstrat.tasks.generation import How


def test_one_of_something_is_singular(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = SimpleNamespace(noun="image", plural="images", column="image")
    rows = SimpleNamespace(files=lambda paths: [SimpleNamespace(name=name) for name in paths], kind=kind)
    task = SimpleNamespace(rows=rows, model=SimpleNamespace(reads_tokens=False))
    text = SimpleNamespace(finds_boxes=False, outputs=lambda *given, **options: 0, record=lambda found: {}, line=str)
    monkeypatch.setattr(inference, "task_of", lambda target: task)
    monkeypatch.setattr(inference, "head_text", lambda target: text)
    monkeypatch.setattr(inference, "load", lambda *given, **options: (None, None, None))
    for number in (1, 2):
        inference.predict_files("m", ["a.png"] * number, tmp_path / f"{number}.jsonl", inference.Boxes())
        assert capsys.readouterr().out.endswith(f": {plural(number, 'image')}\n")


class Terminal:
    def __init__(self, lines: list[str]) -> None:
        self.lines = iter(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return next(self.lines, "")


def test_a_message_that_cannot_be_answered_ends_no_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a terminal, as when a typed text has the model's token of an image; it is left out, and later turns do not have it."""
    asked: list[list[str]] = []

    def prompt_ids(prompt: dict[str, Any]) -> list[int]:
        if "<image>" in prompt["messages"][-1]["content"]:
            raise errors.UserError("the text of a user turn contains <image>, which stands for an image; remove it")
        return [1]

    def stream(model: Any, renderer: Any, prompt: dict[str, Any], how: How) -> str:
        asked.append([turn["content"] for turn in prompt["messages"]])
        return "answer"

    monkeypatch.setattr(inference.generation, "room", lambda *given: 5)
    monkeypatch.setattr(inference.generation, "stream", stream)
    monkeypatch.setattr("sys.stdin", Terminal(["what is <image>?\n", "hello\n", "/quit\n"]))
    monkeypatch.setattr("builtins.input", lambda shown="": next(inference.sys.stdin.lines).rstrip("\n"))
    inference._chat_with_images(None, SimpleNamespace(prompt_ids=prompt_ids), How(4), [])
    assert asked == [["hello"]]
    assert "(the text of a user turn contains <image>" in capsys.readouterr().out


def test_a_batch_norm_of_one_point_has_its_remedies() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        torch.nn.BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
    end = errors.named(caught.value)
    assert end.code == errors.USER
    assert all(part in str(end) for part in ("[1, 3, 1, 1]", "training.per_device_train_batch_size", "image.image_size"))


@pytest.mark.parametrize(
    ("low", "high", "tone", "words"),
    [
        (2.0, 2.5, GOOD, "is below that"),
        (4.5, 5.0, BAD, "is above that"),
        (3.9, 4.5, UNCLEAR, "does not differ from that"),
        (None, None, UNCLEAR, "too few examples"),
    ],
)
def test_the_verdict_on_token_frequencies_is_that_of_the_interval(
    low: float | None, high: float | None, tone: str, words: str
) -> None:
    found = report("sft")
    result = found.finished
    after = result.measured[ROWS].after
    loss = after["loss"].model_copy(update={"low": low, "high": high})
    measured = result.measured[ROWS].model_copy(update={"after": {**after, "loss": loss}})
    changed = result.model_copy(update={"measured": {**result.measured, ROWS: measured}})
    (line,) = [one for one in verdict.reasons(found, changed) if "token frequencies" in one.text]
    assert (line.tone, words in line.text) == (tone, True)


def test_data_of_the_training_is_no_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"train": ["mine/a.csv", "b.csv", {"path": "me/rows", "split": "train"}]}
    recipe = Recipe.model_validate({"model": "m", "strategy": "full", "data": data, "output_dir": "runs/x"})
    monkeypatch.setattr(evaluation, "resolve", lambda target: ("", SimpleNamespace(run=SimpleNamespace(recipe=recipe))))
    same = str(tmp_path / "mine" / "a.csv")
    given = [("b.csv", (), True), (same, (), True), ("other.csv", (), False), (None, (), False)]
    given += [("me/rows", ("data.split=test",), False), ("me/rows", ("data.split=train",), True)]
    for file, overrides, warned in given:
        lines = evaluation.seen_in_training(evaluation.Request("runs/x", overrides=overrides, data=file))
        assert bool(lines) is warned, (file, overrides)


def test_a_run_of_few_steps_is_told_to_be_too_short() -> None:
    assert "training.max_time" in _remedy(2, by_clock=True)
    assert "training.max_steps" in _remedy(1, by_clock=False)
    assert "1 step," in _remedy(1, by_clock=False)
    assert "training.learning_rate" in _remedy(FEW_STEPS, by_clock=True)


def test_rows_that_were_given_in_python_are_named_so() -> None:
    from hfstrat.api.functions import quiet

    file = f"/home/me/.cache/hfstrat/given-{'0a' * 16}.arrow"
    with pytest.raises(errors.UserError) as caught, quiet():
        raise errors.UserError(f"data.train: {file}: task text-classification needs text + label")
    assert str(caught.value) == "data.train: rows given in Python: task text-classification needs text + label"
