"""The card has the numbers of the report, valid metadata, and code that fits the artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.hub_runs import METRICS, finished_run
from helpers.hub_server import LoopbackHub, in_process

from hfstrat.publish import card, snippets
from hfstrat.tasks.report import parse, read


def card_of(run: Path, repo: str = "me/x") -> str:
    return card.make(read(run), run / "final", repo)


def head_of(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    head: dict[str, Any] = yaml.safe_load(found.group(1))
    return head


def code_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found.group(1)


def test_its_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    text = card_of(finished_run(tmp_path / "run"))
    for words in (
        "| loss (nats per token) ↓ | 3.5000 | **2.5000** |",
        "| perplexity ↓ | 33.10 | **12.20** |",
        "| token accuracy | 41.0% | **52.0%** |",
        "1,000 of 50,000 parameters were trained (2.00%)",
        "12s of training, 14s in total",
        "1.00 GiB",
        "the logits are the same bit for bit",
        "`train.jsonl` | training | 60 | 900 | unknown | `13bb97131dd3ba0b`",
        "1,453 supervised tokens",
    ):
        assert words in text, words
    assert "energy" not in text, "it is not measured"


def test_metadata_are_valid(tmp_path: Path) -> None:
    """According to the classes of huggingface_hub and the check of the Hub."""
    from huggingface_hub import HfApi, ModelCard

    text = card_of(finished_run(tmp_path / "run", model={"name_or_path": "owner/base"}))
    head = head_of(text)
    assert head["base_model"] == "owner/base"
    assert head["base_model_relation"] == "adapter"
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "text-generation"
    results = {each.metric_name: each.metric_value for each in ModelCard(text).data.eval_results}
    assert results["perplexity"] == 12.2
    assert len(results) == len(METRICS) - 1, "the number of tokens is not a metric"
    with LoopbackHub() as server, in_process(server, tmp_path / "home"):
        HfApi()._validate_yaml(text, repo_type="model")
        with pytest.raises(ValueError, match="base_model"):
            HfApi()._validate_yaml(text.replace("base_model: owner/base", "base_model: a local model"), repo_type="model")


def test_a_local_base_is_in_no_metadata(tmp_path: Path) -> None:
    text = card_of(finished_run(tmp_path / "run"))
    assert "base_model" not in head_of(text)
    assert "the local model `Tiny-Base`" in text
    assert f"`{'fe' * 32}`" in text
    assert "/opt/models" not in text


def test_known_licenses_are_named(tmp_path: Path) -> None:
    base, data = tmp_path / "base", tmp_path / "data"
    for folder, license in ((base, "apache-2.0"), (data, "cc-by-4.0")):
        folder.mkdir()
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\nwords\n")
    (data / "rows.jsonl").write_text("{}")
    run = finished_run(tmp_path / "run", model={"name_or_path": str(base)}, data={"train": str(data / "rows.jsonl")})
    report = json.loads((run / "report.json").read_text())
    report["run"]["data"]["train"]["source"] = str(data / "rows.jsonl")
    text = card.make(parse(report), run / "final", "me/x")
    assert head_of(text)["license"] == "apache-2.0"
    assert "| `rows.jsonl` | training | 60 | 900 | cc-by-4.0 |" in text


def test_code_fits_the_artifact(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", model={"name_or_path": "owner/base"})
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/x"' in code_of(card_of(run))
    own = code_of(card_of(finished_run(tmp_path / "own")))
    assert 'PeftModel.from_pretrained(base, "me/x")' in own
    assert 'AutoModelForCausalLM.from_pretrained("path/to/Tiny-Base", dtype="auto")' in own
    (run / "final" / "adapter_config.json").unlink()
    assert '= AutoModelForCausalLM.from_pretrained("me/x", dtype="auto")' in code_of(card_of(run))
    (run / "final" / "modules.json").write_text("[]")
    assert 'SentenceTransformer("me/x")' in code_of(card_of(run))


@pytest.mark.parametrize("kind", ["adapter", "own", "whole", "sentence", "classifier"])
def test_code_is_python(tmp_path: Path, kind: str) -> None:
    model = {} if kind == "own" else {"model": {"name_or_path": "owner/base"}}
    run = finished_run(tmp_path / "run", **model, **({"task": "text-classification"} if kind == "classifier" else {}))
    final = run / "final"
    if kind in ("whole", "sentence"):
        (final / "adapter_config.json").unlink()
    if kind == "sentence":
        (final / "modules.json").write_text("[]")
    if kind == "classifier":
        (final / "config.json").write_text("{}")
    compile(code_of(card_of(run)), "card", "exec")


def test_answers_cannot_leave_their_block(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", evaluation={"prompts": ["a row of the evaluation data"]})
    report = json.loads((run / "report.json").read_text())
    report["result"]["answers"][0] |= {"after": "```\n# not a heading\n```"}
    text = card.make(parse(report), run / "final", "me/x")
    assert "````text\n```\n# not a heading\n```\n````" in text


def test_a_table_by_label(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", task="text-classification")
    report = json.loads((run / "report.json").read_text())
    report["result"]["metrics_after"] = {"loss": 0.5, "accuracy": 0.9, "macro_f1": 0.8, "rows": 10.0}
    labels = [{"label": "a|b", "precision": 0.5, "recall": 1.0, "f1": 0.667, "support": 7}]
    report["result"]["evaluation"] = {"labels": labels}
    text = card.make(parse(report), run / "final", "me/x")
    assert r"| `a\|b` | 50.0% | 100.0% | 66.7% | 7 |" in text
    assert {each["type"] for each in head_of(text)["model-index"][0]["results"][0]["metrics"]} == {"loss", "accuracy", "f1"}


def test_further_measurements_have_tables(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    one = {
        "rows": 40,
        "before": {"accuracy": entry},
        "after": {"accuracy": entry, "loss": {"value": 2.0, "low": None, "high": None}},
    }
    report["result"]["measured"] = {"control text": one | {"difference": {"accuracy": entry}}}
    text = card.make(parse(report), run / "final", "me/x")
    assert "**Control text** (40 examples)" in text
    assert "| accuracy | 50.0% ± 10.0% | **50.0% ± 10.0%** | +50.0 pp ± 10.0 pp |" in text
    assert "| loss | – | **2.0000** | – |" in text
    assert "may have forgotten" not in text


def test_snippets_of_a_local_run(tmp_path: Path) -> None:
    text = "\n".join(snippets.show(str(finished_run(tmp_path / "run"))))
    assert "--max-lora-rank 8 --lora-modules mine=" in text
    assert "hfstrat merge" in text
    assert "transformers serve" in text
    assert "ollama create" in text
    assert str(tmp_path / "run" / "final") in text
