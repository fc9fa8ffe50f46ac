"""AUROC, average precision and balanced accuracy equal scikit-learn's, whatever the weights of the rows; class weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, precision_recall_curve, roc_auc_score

from hfstrat.errors import UserError
from hfstrat.tasks.image_classification import ImageMetrics
from hfstrat.tasks.rankings import MOST, Ranking, score_of, truth_of
from hfstrat.tasks.text_classification.class_weights import weights_of
from hfstrat.tasks.text_classification.scores import class_loss


def examples(rows: int, classes: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Marks and probabilities of a classifier that is better than chance."""
    source = np.random.default_rng(seed)
    true = source.permutation(np.arange(rows) % classes)
    logits = source.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[true]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chances = np.round(chances, 1) if ties else chances
    return np.stack([true, chances.argmax(1)], axis=1), chances


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_rankings_are_those_of_scikit_learn(classes: int, ties: bool, weighted: bool) -> None:
    marks, chances = examples(60, classes, classes, ties)
    source = np.random.default_rng(1)
    weights = source.integers(0, 4, 60).astype(float) if weighted else np.ones(60)
    true = truth_of(marks, classes)
    auroc, precision = Ranking(chances, true).score(weights)
    for index in range(classes):
        given = (true[:, index], chances[:, index])
        assert auroc[index] == pytest.approx(roc_auc_score(*given, sample_weight=weights))
        assert precision[index] == pytest.approx(average_precision_score(*given, sample_weight=weights))
    found = score_of(marks, chances, classes)(weights)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(*marks.T, sample_weight=weights))
    assert found["auroc"] == pytest.approx(auroc.mean())


@pytest.mark.parametrize("ties", [False, True])
def test_recall_at_a_precision_is_that_of_a_precision_recall_curve(ties: bool) -> None:
    marks, chances = examples(80, 3, 4, ties)
    weights, true = np.random.default_rng(3).integers(0, 4, 80).astype(float), truth_of(marks, 3)
    found = Ranking(chances, true).recall(weights, 0.7)
    for index in range(3):
        precision, recall, _ = precision_recall_curve(true[:, index], chances[:, index], sample_weight=weights)
        assert found[index] == pytest.approx(recall[precision >= 0.7].max())


def test_the_recall_of_a_rare_class_is_measured_by_itself() -> None:
    """Of classes of about the same size none is rare."""
    source = np.random.default_rng(5)
    true = (source.permutation(200) < 8).astype(np.int64)
    chance = np.clip(source.normal(0.2 + 0.4 * true, 0.15), 0.01, 0.99)
    marks, chances = np.stack([true, (chance > 0.5).astype(np.int64)], 1), np.stack([1 - chance, chance], 1)
    precision, recall, _ = precision_recall_curve(true, chance)
    found = score_of(marks, chances, 2)(np.ones(200))["recall_at_90_precision"]
    assert found == pytest.approx(recall[precision >= 0.9].max())
    assert "recall_at_90_precision" not in score_of(*examples(60, 3, 1), 3)(np.ones(60))


def test_weights_are_repetitions() -> None:
    marks, chances = examples(40, 3, 5)
    weights = np.random.default_rng(2).integers(0, 3, 40)
    whole = score_of(marks, chances, 3)(weights.astype(float))
    repeated = np.repeat(np.arange(40), weights)
    found = score_of(marks[repeated], chances[repeated], 3)(np.ones(len(repeated)))
    assert whole == pytest.approx({name: found[name] for name in whole})  # a class that is rare in the rows may not be before


def test_a_class_that_does_not_occur_does_not_count() -> None:
    marks, chances = examples(40, 3, 6)
    weights = (marks[:, 0] != 2).astype(float)
    found = score_of(marks, chances, 3)(weights)
    assert all(np.isfinite(value) for value in found.values())
    auroc, precision = Ranking(chances, truth_of(marks, 3)).score(weights)
    assert np.isnan(precision[2])
    assert np.isnan(auroc[2])


def test_very_many_rankings_are_left_out() -> None:
    marks = np.zeros((MOST // 2, 2), dtype=np.int64)
    chances = np.zeros((MOST // 2, 3), dtype=np.float32)
    assert set(score_of(marks, chances, 3)(np.ones(len(marks)))) == {"balanced_accuracy"}


@pytest.mark.parametrize("many", [False, True])
def test_sums_give_the_same_metrics_for_any_batch_size(many: bool) -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, generator=source)
    labels: torch.Tensor = (torch.rand(12, 3, generator=source) > 0.5).float() if many else torch.arange(12) % 3
    metrics = ImageMetrics(labels=("a", "b", "c"))

    def sums(size: int) -> tuple[np.ndarray, ...]:
        parts = [
            metrics.sums(lambda at=at: {"logits": logits[at : at + size]}, {"labels": labels[at : at + size]})
            for at in range(0, 12, size)
        ]
        return tuple(torch.cat(one).numpy() for one in zip(*parts, strict=True))

    whole, parts = (metrics.measure(sums(size))[0] for size in (12, 5))
    assert whole == pytest.approx(parts)
    assert metrics.score(sums(12), {})(np.ones(12)).items() <= whole.items()


# class weights


def data(**more: Any) -> Any:
    return SimpleNamespace(many=False, counts=np.array([80, 15, 5]), label_names=("a", "b", "c"), **more)


def test_balanced_weights_count_all_classes_equally() -> None:
    weights, gamma = weights_of("balanced", data())
    assert gamma == 0
    assert np.allclose(np.array(weights) * [80, 15, 5], 100 / 3), "n / K for each class"


def test_the_mean_weight_over_rows_is_one() -> None:
    for wanted in ("balanced", [1, 2, 50], {"c": 9.0, "a": 1.0, "b": 3.0}):
        weights, _ = weights_of(wanted, data())
        assert np.dot(weights, [80, 15, 5]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([1, 2], "2 weights, but the data have 3 classes"),
        ({"a": 1, "b": 1}, "'c' has no weight"),
        ({"d": 1}, "'a' has no weight"),
    ],
)
def test_weights_of_other_classes_are_refused(wanted: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights_of(wanted, data())


def test_several_labels_have_no_weights() -> None:
    several = data()
    several.many = True
    with pytest.raises(UserError, match="rows have any number of labels"):
        weights_of("balanced", several)


@pytest.mark.parametrize("options", [{"weights": (0.5, 1.0, 4.0)}, {"gamma": 2.0}])
def test_parts_of_a_step_have_the_gradient_of_the_step(options: dict[str, Any]) -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % 3
    class_loss({"logits": logits}, labels, **options).backward()
    whole = logits.grad
    assert whole is not None
    logits.grad = None
    for part in (slice(0, 2), slice(2, 9)):
        class_loss({"logits": logits[part]}, labels[part], 9, **options).backward()
    assert logits.grad is not None
    assert torch.allclose(whole, logits.grad)


def test_a_solved_head_minimizes_the_weighted_loss() -> None:
    """Whole weights are repetitions of rows."""
    from hfstrat.strategies.head.linear import fit_logistic

    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels, repeats = torch.arange(60) % 3, torch.tensor([1, 2, 4])[torch.arange(60) % 3]
    mean = repeats.double().mean()
    # repeated rows have another mean and spread, so both are standardized first
    features = (features - features.repeat_interleave(repeats, 0).mean(0)) / features.repeat_interleave(repeats, 0).std(0)
    weighted, _ = fit_logistic(features, labels, 3, 0.0, row_weights=repeats / mean)
    repeated, _ = fit_logistic(features.repeat_interleave(repeats, 0), labels.repeat_interleave(repeats), 3, 0.0)
    assert torch.allclose(weighted.logits(features), repeated.logits(features), atol=1e-3)
