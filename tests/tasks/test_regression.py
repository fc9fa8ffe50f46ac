"""Numbers for texts: trained on standardized targets, measured and saved in original units, by every strategy that suits it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, write_jsonl
from helpers.classifiers import make_any
from scipy import stats

from hfstrat.recipe.load import load_recipe
from hfstrat.run.train import run
from hfstrat.tasks import TASKS

TASK = TASKS["regression"]
COUNT = 90


def measured(folder: Path, targets: int = 1, offset: float = 2000.0) -> Path:
    """Texts whose number is `offset` plus how often a word is in them; a second target is a small negative number."""
    source = random.Random(3)
    rows: list[dict[str, Any]] = []
    for number in range(COUNT):
        hits = number % 4
        words = [*source.choices(WORDS[3:], k=source.randint(2, 6)), *["cat"] * hits, str(number)]
        source.shuffle(words)
        values = [offset + 5.0 * hits, -0.01 * hits]
        rows.append({"text": " ".join(words)} | ({"score": values[0]} if targets == 1 else {"scores": values}))
    return write_jsonl(folder / "measured.jsonl", rows)


@pytest.fixture
def regress(tmp_path: Path) -> Callable[..., Any]:
    """`regress("bert", "strategy=full", targets=2)` loads a recipe for tiny models."""

    def load(family: str, *overrides: str, targets: int = 1, offset: float = 2000.0) -> Any:
        model = make_any(tmp_path / family, family)
        file = tmp_path / "recipe.yaml"
        rows = measured(tmp_path, targets, offset)
        file.write_text(
            f"task: regression\nmodel: {model}\nstrategy: full\ndata: {{train: {rows}, eval_size: 20, max_length: 64}}\n"
            "training: {max_steps: 6, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2,\n"
            "  eval_steps: 3, logging_steps: 1}\n"
            f"evaluation: {{samples: 2}}\noutput_dir: {tmp_path / 'run'}\n"
        )
        return load_recipe(str(file), list(overrides))

    return load


RUNS = [
    ("bert", "full"),
    ("bert", "lora"),
    ("bert", "{name: partial, last_n_layers: 1}"),
    ("bert", "head"),
    ("bert", "{name: head, head: mlp, hidden_size: 8}"),
    ("bert", "{name: head, then: full}"),
    ("roberta", "full"),
    ("modernbert", "head"),
    ("llama", "full"),
    ("llama", "lora"),
    ("llama", "{name: head, pooling: last}"),
    ("llama", "{name: head, pooling: last, solver: trainer}"),
    ("llama", "{name: head, then: lora}"),
    ("gpt2", "{name: head, pooling: mean}"),
]


VERIFIED = [("bert", "lora"), ("llama", "full")]  # in a fresh process
UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


@pytest.mark.parametrize(("family", "strategy"), RUNS)
def test_a_run_predicts_in_original_units(regress: Any, family: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain libraries load the result, and its predictions have the metrics of the report."""
    if (family, strategy) not in VERIFIED:
        monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    loaded = regress(family, f"strategy={strategy}", targets=2)
    report = run(loaded)
    assert report is not None
    result = report["result"]
    assert result["verified"]["max_difference"] < 1
    after = result["metrics_after"]
    assert after["mae"] < 200, "random weights begin near the mean"
    folder = Path(result["artefact"])
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert list(config["id2label"].values()) == ["scores_0", "scores_1"]
    found = predictions(loaded, folder)
    true, predicted = found[:, :, 0], found[:, :, 1]
    assert math.isclose(after["mae"], np.abs(true - predicted).mean(), rel_tol=1e-3)
    assert math.isclose(after["rmse"], np.sqrt(np.square(true - predicted).mean(0)).mean(), rel_tol=1e-3)
    assert math.isclose(
        after["pearson"], np.mean([stats.pearsonr(true[:, k], predicted[:, k])[0] for k in range(2)]), abs_tol=5e-2
    )


def predictions(loaded: Any, folder: Path) -> np.ndarray:
    """Targets and predictions `[examples, targets, 2]` of the evaluation examples, by the loaded result."""
    from hfstrat.tasks import artifact

    recipe = loaded.recipe
    model, tokenizer, _ = artifact.load(str(folder.parent))
    data = TASK.rows.prepare(recipe.data, tokenizer, recipe.seed, 0, recipe.evaluation.max_rows)
    rows = []
    for row in data.eval:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([row["input_ids"]]), attention_mask=torch.ones(1, row["length"]).long()
            ).logits
        rows.append(np.stack([row["label"], logits[0].double().numpy()], axis=1))
    return np.stack(rows)
