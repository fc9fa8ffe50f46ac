"""A threshold for each label: against a search over all cuts, on skewed labels, and after reloading."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, write_jsonl
from helpers.classifiers import write_recipe
from helpers.runs import run

from hfstrat.errors import UserError
from hfstrat.evaluation.evaluate import Request, evaluate
from hfstrat.publish import snippets
from hfstrat.recipe.load import load_recipe
from hfstrat.strategies.head.linear import fit_logistic, out_of_fold
from hfstrat.tasks import artifact
from hfstrat.tasks.text_classification import ClassMetrics, thresholds
from hfstrat.tasks.text_classification.scores import class_sums, of_sums, predicted_classes

NAMES = ("often", "rare", "rarest")


def f1_of(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(2 * (predicted & true).sum() / max(1, predicted.sum() + true.sum()))


def test_the_best_threshold_is_that_of_a_search_over_all_cuts() -> None:
    source = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        true = source.random(400) < share
        chances = np.round(np.clip(0.3 * true + source.random(400) * 0.7, 0, 1), 2)  # with ties
        cuts = (np.unique(chances)[1:] + np.unique(chances)[:-1]) / 2
        wanted = max(f1_of(chances > cut, true) for cut in [*cuts, 0.001])
        assert f1_of(chances > thresholds.best(chances, true), true) == pytest.approx(wanted)


def skewed(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and 28 labels whose frequency falls from a third to one in two hundred."""
    shares = np.geomspace(0.33, 0.005, 28)
    directions = np.random.default_rng(1).normal(size=(28, 48))
    source = np.random.default_rng(seed)
    features = source.normal(size=(rows, 48))
    scores = features @ directions.T / 48**0.5 * 2 + source.logistic(size=(rows, 28))
    edges = np.array([np.quantile(column, 1 - share) for column, share in zip(scores.T, shares, strict=True)])
    return torch.tensor(features, dtype=torch.float32), torch.tensor((scores > edges).astype(np.float32))


def test_skewed_labels_have_a_higher_macro_f1_than_at_one_half() -> None:
    """Chosen out of fold, measured on other rows. With few rows per label it is at least no worse."""
    (x, y), (new, true) = skewed(1200, 2), skewed(3000, 3)
    layer, strength = fit_logistic(x, y, 28)
    chances = out_of_fold(x, y, 28, strength, True).sigmoid().numpy()
    chosen, names = thresholds.choose(chances, y.numpy() > 0.5), tuple(map(str, range(28)))
    found = []
    for limits in (None, chosen):
        sums, marks = class_sums(layer.logits(new).float(), true, limits)
        found.append(of_sums(sums.numpy(), marks.numpy(), names)[0])
    assert found[1]["macro_f1"] > found[0]["macro_f1"] + 0.05
    assert found[1]["micro_f1"] > found[0]["micro_f1"]
    assert found[1]["loss"] == found[0]["loss"]


def test_labels_without_examples_keep_one_half() -> None:
    chances, true = np.random.default_rng(0).random((50, 3)), np.zeros((50, 3), dtype=bool)
    true[:20, 0] = True
    assert thresholds.choose(chances, true)[1:].tolist() == [0.5, 0.5]


def rows_of(folder: Path) -> Path:
    source, rows = random.Random(0), []
    for number in range(320):
        labels = [name for name, every in zip(NAMES, (2, 6, 11), strict=True) if number % every == 0]
        words = [*source.choices(WORDS[3:], k=4), *labels, str(number)]
        rows.append({"text": " ".join(words), "labels": labels if source.random() < 0.9 else []})
    return write_jsonl(folder / "rows.jsonl", rows)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("bert", "head"), ("llama", "full"), pytest.param("bert", "{name: lora, r: 4}", marks=pytest.mark.slow)],
)
def test_thresholds_are_stored_reported_and_used(
    tmp_path: Path, bodies: Any, family: str, strategy: str, monkeypatch: Any
) -> None:
    """The report's figures are those of the saved model with the thresholds in its config, on rows that did not choose them."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    recipe = write_recipe(tmp_path, bodies(family), rows_of(tmp_path))
    loaded = load_recipe(str(recipe), [f"strategy={strategy}", "training.max_steps=6", "model.dtype=float32"])
    report = run(loaded)
    rows = {row["label"]: row["threshold"] for row in report["result"]["evaluation"]["labels"]}
    final = tmp_path / "run" / "final"
    assert json.loads((final / "config.json").read_text())["label_thresholds"] == rows
    assert rows.keys() == set(NAMES)
    assert artifact.load(str(tmp_path / "run"))[0].config.label_thresholds == rows
    again = evaluate(Request(str(tmp_path / "run")))
    assert again is not None
    measured = {name: entry["value"] for name, entry in again["measured"]["evaluation rows"]["after"].items()}
    for name in ("accuracy", "macro_f1", "micro_f1"):
        assert measured[name] == pytest.approx(report["result"]["metrics_after"][name])
    assert "label_thresholds[label]" in snippets.snippet(snippets.Artifact(final, None, "x"))
    assert "| threshold |" in (final / "README.md").read_text()


def test_the_threshold_of_a_precision_is_that_of_a_search_over_all_cuts() -> None:
    source = np.random.default_rng(0)
    for share, precision in ((0.05, 0.9), (0.05, 0.6), (0.3, 0.9), (0.02, 0.99)):
        true = source.random(400) < share
        chances = np.round(np.clip(0.35 * true + source.random(400) * 0.65, 0, 1), 2)  # with ties
        cuts = [(high + low) / 2 for high, low in zip(np.unique(chances)[1:], np.unique(chances)[:-1], strict=True)]
        good = [cut for cut in cuts if true[chances > cut].mean() >= precision]
        found = thresholds.at_precision(chances, true, precision)
        assert found == (pytest.approx(min(good)) if good else None)
    assert thresholds.at_precision(np.array([0.9, 0.8, 0.1]), np.array([False, False, True]), 0.9) is None


def test_a_rare_class_is_predicted_above_its_threshold_and_nowhere_else() -> None:
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    chances = logits.softmax(-1)
    for threshold in (0.1, 0.7):
        found = predicted_classes(logits, (2, threshold))
        others = chances.clone()
        others[:, 2] = 0
        expected = [2 if row[2] > threshold else int(other.argmax()) for row, other in zip(chances, others, strict=True)]
        assert found.tolist() == expected
    assert (predicted_classes(logits) == logits.argmax(-1)).all()


def test_thresholds_near_0_and_1_are_kept() -> None:
    """A well-separated class has its threshold far below one half, or above it."""
    metrics = ClassMetrics(labels=("many", "rare"))
    source = np.random.default_rng(0)
    for center in (-22.0, 22.0):
        margins = center + source.normal(size=2000)
        margins[:40] += 3.0
        labels = (np.arange(2000) < 40).astype(np.int64)
        logits = np.stack([-margins / 2, margins / 2], 1).astype(np.float32)
        threshold = metrics.rare_threshold(logits, labels, 1, 0.7)
        assert threshold is not None
        stored = json.loads(json.dumps(threshold))
        found = predicted_classes(torch.tensor(logits), (1, stored)).numpy() == 1
        assert 20 <= found.sum() <= 60
        assert labels[found].mean() >= 0.7


def one_rare(folder: Path, every: int = 9) -> Path:
    source, rows = random.Random(0), []
    for number in range(360):
        label = "rare" if number % every == 0 else ("often", "more")[number % 2]
        clear = label if source.random() < 0.95 else source.choice(("often", "rare"))
        rows.append({"text": f"{' '.join(source.choices(WORDS[3:], k=4))} {clear} {number}", "label": label})
    return write_jsonl(folder / "rows.jsonl", rows)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("bert", "head"), ("llama", "full"), pytest.param("bert", "{name: head, solver: trainer}", marks=pytest.mark.slow)],
)
def test_a_threshold_of_a_rare_class_is_stored_reported_and_used(
    tmp_path: Path, bodies: Any, family: str, strategy: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    recipe = write_recipe(tmp_path, bodies(family), one_rare(tmp_path))
    more = [
        "training.max_steps=80",
        "model.dtype=float32",
        "evaluation.rare_class_precision=0.5",
        "training.learning_rate=3e-3",
    ]
    report = run(load_recipe(str(recipe), [f"strategy={strategy}", *more]))
    printed = " ".join(capsys.readouterr().out.split())
    final, row = tmp_path / "run" / "final", next(r for r in report["result"]["evaluation"]["labels"] if r["label"] == "rare")
    stored = json.loads((final / "config.json").read_text()).get("label_thresholds")
    assert stored is not None, printed
    assert f"rare is predicted above {stored['rare']:.3g}" in printed
    assert stored == {"rare": row["threshold"]}
    again = evaluate(Request(str(tmp_path / "run")))
    assert again is not None
    measured = {name: entry["value"] for name, entry in again["measured"]["evaluation rows"]["after"].items()}
    assert measured["macro_f1"] == pytest.approx(report["result"]["metrics_after"]["macro_f1"])
    assert "label_thresholds" in snippets.snippet(snippets.Artifact(final, None, "x"))


WRONG = [
    ("evaluation.rare_class_precision=0.9", 2, "no class is rare: the fewest examples has"),
    ("evaluation.rare_class_precision=0.9", 120, "rare has 3 training examples, of which 100% would choose the threshold"),
    ("evaluation.rare_class_precision=0.2", 9, "evaluation.rare_class_precision = 0.2: expected"),
]


@pytest.mark.parametrize(("override", "every", "message"), WRONG)
def test_a_threshold_without_a_rare_class_is_refused(
    tmp_path: Path, bodies: Any, override: str, every: int, message: str
) -> None:
    recipe = write_recipe(tmp_path, bodies("bert"), one_rare(tmp_path, every))
    with pytest.raises(UserError, match=message):
        run(load_recipe(str(recipe), ["strategy=head", "data.eval_size=20", override]))
    assert not (tmp_path / "run").exists()


UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}
