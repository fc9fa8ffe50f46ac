"""A classifier's losses and metrics against slow obvious references, and the law of equal splits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.classifiers import make_any

from hfstrat.data.collate import ClassCollator
from hfstrat.tasks.text_classification.scores import class_loss, class_sums, of_sums

CLASSES = 4


def reference(logits: torch.Tensor, labels: torch.Tensor, count: int) -> float:
    """One row, and one label, at a time."""
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if isinstance(label, list):
            for score, holds in zip(row, label, strict=True):
                chance = 1 / (1 + math.exp(-score))
                total -= math.log(chance if holds else 1 - chance)
        else:
            total -= row[label] - math.log(sum(map(math.exp, row)))
    return total / count


def a_batch(many: bool, rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    labels = (torch.rand(rows, CLASSES) < 0.4).float() if many else torch.randint(0, CLASSES, (rows,))
    return 2 * torch.randn(rows, CLASSES), labels


@pytest.mark.parametrize("many", [False, True], ids=["one", "several"])
def test_the_loss_equals_the_reference(many: bool) -> None:
    logits, labels = a_batch(many)
    for count in (None, 100):
        expected = reference(logits, labels, count or labels.numel())
        assert math.isclose(float(class_loss({"logits": logits}, labels, count)), expected, rel_tol=1e-6)
        assert math.isclose(float(class_loss({"logits": logits.bfloat16()}, labels, count)), expected, rel_tol=1e-2)


@pytest.mark.parametrize("many", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_any_split_of_a_batch_has_the_same_loss_and_gradient(tmp_path: Path, family: str, many: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = make_any(tmp_path, family)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES, dtype=torch.float64)
    model.eval()  # without dropout
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index, length in enumerate((5, 9, 14, 30, 31, 6, 22, 12)):
        label: Any = [index % CLASSES, (index + 1) % CLASSES][: index % 3] if many else index % CLASSES
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "token_type_ids": [], "label": label})
    collate = ClassCollator(model.config.pad_token_id, 8, False, CLASSES if many else None)
    items = 8 * CLASSES if many else 8

    def gradients(micro: int) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = 0.0
        for start in range(0, 8, micro):
            batch = collate(rows[start : start + micro])
            part = class_loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"], items)
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, expected = gradients(8)
    for micro in (1, 2, 4):
        loss, found = gradients(micro)
        assert math.isclose(loss, whole, rel_tol=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


def f1_of(true: list[bool], said: list[bool]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one label, as scikit-learn defines them with zero_division=0."""
    hits = sum(t and s for t, s in zip(true, said, strict=True))
    precision = hits / sum(said) if sum(said) else 0.0
    recall = hits / sum(true) if sum(true) else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def sums_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    sums, marks = class_sums(logits, labels)
    return sums.numpy(), marks.numpy()


NAMES = ("a", "b", "c", "d", "never")


def test_metrics_of_one_label_a_row_equal_the_reference() -> None:
    logits, labels = a_batch(False, rows=40)
    logits = torch.cat([logits, torch.full((40, 1), -99.0)], dim=1)  # a label that is neither asked for nor said
    metrics, details = of_sums(*sums_of(logits, labels), NAMES)
    true, said = labels.tolist(), logits.argmax(-1).tolist()
    wanted = [f1_of([t == c for t in true], [s == c for s in said]) for c in range(5)]
    assert math.isclose(metrics["loss"], reference(logits, labels, 40), rel_tol=1e-6)
    assert math.isclose(metrics["accuracy"], sum(t == s for t, s in zip(true, said, strict=True)) / 40)
    assert math.isclose(metrics["macro_f1"], sum(f1 for *_, f1 in wanted[:4]) / 4)
    for row, (precision, recall, f1), name in zip(details["labels"], wanted, NAMES, strict=True):
        assert row["label"] == name
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx([precision, recall, f1])
    assert details["confusion"]["counts"][true[0]][said[0]] == sum(
        (t, s) == (true[0], said[0]) for t, s in zip(true, said, strict=True)
    )
    assert np.sum(details["confusion"]["counts"]) == 40
    assert details["confusions"][0]["count"] == max(
        count for t, row in enumerate(details["confusion"]["counts"]) for s, count in enumerate(row) if t != s
    )


def test_metrics_of_several_labels_a_row_equal_the_reference() -> None:
    logits, labels = a_batch(True, rows=40)
    metrics, details = of_sums(*sums_of(logits, labels), NAMES[:4])
    true, said = labels > 0.5, logits.sigmoid() > 0.5
    wanted = [f1_of(true[:, c].tolist(), said[:, c].tolist()) for c in range(4)]
    assert math.isclose(metrics["loss"], reference(logits, labels, 160), rel_tol=1e-6)
    assert math.isclose(metrics["accuracy"], float((true == said).all(1).double().mean()))
    assert math.isclose(metrics["macro_f1"], sum(f1 for *_, f1 in wanted) / 4)
    assert math.isclose(metrics["micro_f1"], f1_of(true.flatten().tolist(), said.flatten().tolist())[2])
    assert [row["support"] for row in details["labels"]] == true.sum(0).tolist()


def test_metrics_are_scikit_learns() -> None:
    scores: Any = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for many in (False, True):
        logits, labels = a_batch(many, rows=50)
        said = (logits > 0).float() if many else logits.argmax(-1)
        metrics, _ = of_sums(*sums_of(logits, labels), NAMES[:4])
        assert math.isclose(metrics["accuracy"], scores.accuracy_score(labels, said))
        assert math.isclose(metrics["macro_f1"], scores.f1_score(labels, said, average="macro", zero_division=0))


def test_ten_thousand_labels_make_a_short_report() -> None:
    labels = torch.arange(200)
    logits = torch.zeros(200, 10_000)
    logits[torch.arange(200), (labels + labels % 2)] = 5.0
    metrics, details = of_sums(*sums_of(logits, labels), tuple(map(str, range(10_000))))
    assert metrics["accuracy"] == 0.5
    assert "confusion" not in details
    assert len(details["confusions"]) == 20


@pytest.mark.parametrize("many", [False, True], ids=["one", "several"])
def test_the_trainer_counts_the_rows_of_the_whole_step(tmp_path: Path, many: bool, set_counter: Callable[..., Any]) -> None:
    """Labels of a classifier are not shifted: `[B]` counts B items and `[B, L]` counts B x L."""
    assert set_counter(tmp_path, many) == (8 * 3 if many else 8)


@pytest.fixture
def set_counter() -> Callable[..., Any]:
    def count(folder: Path, many: bool) -> int:
        from types import SimpleNamespace

        from helpers.classifiers import labeled, write_recipe

        from hfstrat.recipe.load import load_recipe
        from hfstrat.run import setup

        recipe = write_recipe(folder, make_any(folder / "model", "llama"), labeled(folder, many=many))
        world: Any = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
        trainer = setup.set_up(load_recipe(str(recipe)), world, overwrite=False).trainer
        batches = iter(trainer.get_train_dataloader())
        _, items = trainer.get_batch_samples(batches, 2, trainer.args.device)
        return int(items)

    return count


@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 0.5)])
def test_shares_of_classes_have_the_shares_of_their_losses(weights: tuple[float, ...]) -> None:
    """Mixup (arXiv 1710.09412): the loss of a mixed row is that of both of its classes, and a step is a mean over rows."""
    logits = torch.randn(6, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    first, second, share = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 0, 2, 2, 0]), torch.linspace(0, 1, 6).double()
    each = [torch.nn.functional.one_hot(labels, 3).double() for labels in (first, second)]
    shares = share[:, None] * each[0] + (1 - share)[:, None] * each[1]
    weight = torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
    plain = [torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weight[labels] for labels in (first, second)]
    expected = float((share * plain[0] + (1 - share) * plain[1]).mean())
    assert math.isclose(float(class_loss({"logits": logits}, shares, weights=weights, mixes=True)), expected)
    parts = [class_loss({"logits": logits[rows]}, shares[rows], 18, weights, mixes=True) for rows in (slice(0, 2), slice(2, 6))]
    assert math.isclose(float(sum(parts)), expected), "the Trainer counts the numbers of the labels"
    whole = class_loss({"logits": logits}, first, weights=weights, mixes=True)
    assert math.isclose(float(whole), float(plain[0].mean())), "rows of an evaluation have one class"
