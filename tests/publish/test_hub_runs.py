"""Trained, pushed to a Hub on the loopback, loaded from it by plain peft or transformers: the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.classifiers import labeled
from helpers.commands import DATA, MODEL, quickstart
from helpers.hub_server import LoopbackHub, in_process
from helpers.runs import run

PUSH = "hub={push_to_hub: true, repo_id: me/x}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as served, in_process(served, tmp_path / "home"):
        yield served


def logits(model: Any, length: int = 24) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 3 + length)[None]).logits.float()
    return found


def from_hub(base: Path, dtype: Any) -> Any:
    """As in the card: the base is local, the adapter is from the Hub."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), "me/x")


def on_disk(base: Path, folder: Path, dtype: Any) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder)


def test_a_pushed_adapter_computes_the_same(server: LoopbackHub, recipe: Any, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    report = run(recipe(PUSH, "training.max_steps=2"))
    assert report
    assert report["result"]["hub"]["compared"]
    final = tmp_path / "run" / "final"
    want = logits(on_disk(tiny, final, torch.float32))
    assert torch.equal(logits(from_hub(tiny, torch.float32)), want)
    theirs, ours = (AutoTokenizer.from_pretrained(name) for name in ("me/x", final))
    assert theirs("the cat")["input_ids"] == ours("the cat")["input_ids"]
    assert theirs.chat_template == ours.chat_template
    everything = b"".join(file.content for file in server.repos["me/x"].main.values())
    assert str(tmp_path).encode() not in everything
    assert str(tiny.parent).encode() not in everything
    assert str(tmp_path) not in (final / "README.md").read_text(), "nor is it in the card next to the result"


@pytest.mark.slow
def test_a_pushed_classifier_computes_the_same(server: LoopbackHub, recipe: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rows = labeled(tmp_path, 40)
    short = ("training.max_steps=2", "data.max_length=64", f"data.train={rows}")
    assert run(recipe(PUSH, "task=text-classification", "strategy=full", *short))
    one, two = (AutoModelForSequenceClassification.from_pretrained(name) for name in (tmp_path / "run" / "final", "me/x"))
    assert torch.equal(logits(one), logits(two))
    assert one.config.id2label == two.config.id2label


def test_a_run_does_not_fail_with_the_hub(
    server: LoopbackHub, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hfstrat.publish import push

    monkeypatch.setattr(push, "PATIENT", ())
    server.fail("POST .*/commit", status=403)
    assert run(recipe(PUSH, "training.max_steps=2"))
    assert f"`hfstrat push {tmp_path / 'run'}` tries again" in capsys.readouterr().out
    server.heal()
    assert "pushed" in push.push_run(str(tmp_path / "run"), None, None, None)[0]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["result"]["hub"]["compared"]


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL.is_dir() and DATA.is_dir()), reason="needs the demo model: `make test-slow` fetches it")
def test_the_quickstarts_adapter_computes_the_same(server: LoopbackHub, tmp_path: Path) -> None:
    result = quickstart(tmp_path, PUSH)
    assert result["hub"]["compared"]
    want = logits(on_disk(MODEL, tmp_path / "run" / "final", torch.bfloat16))
    assert torch.equal(logits(from_hub(MODEL, torch.bfloat16)), want)
