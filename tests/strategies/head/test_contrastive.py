"""Contrastive training before the head is solved: pairs and loss against a slow reference, equal weights, refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.classifiers import labeled, write_recipe
from helpers.runs import run, weights
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CosineSimilarityLoss

from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.strategies.head import contrastive

SETTINGS = ["strategy={name: head, contrastive: true, contrastive_steps: 6}", "evaluation.samples=0", "model.dtype=float32"]


def test_pairs_are_all_equal_ones_and_as_many_different_ones() -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
    left, right, targets = contrastive.pairs(labels, torch.Generator().manual_seed(0))
    found = set(zip(left.tolist(), right.tolist(), strict=True))
    equal = {pair for pair in itertools.combinations(range(8), 2) if labels[pair[0]] == labels[pair[1]]}
    assert len(found) == len(left) == 2 * len(equal)
    assert {
        pair for pair, target in zip(zip(left.tolist(), right.tolist(), strict=True), targets, strict=True) if target
    } == equal


def test_the_loss_is_that_of_pairs_one_by_one() -> None:
    """The mean squared distance of the cosine from 1 or 0, in float64, and its gradient."""
    embedded = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    left, right, targets = contrastive.pairs(torch.tensor([0, 1, 0, 1, 1, 0, 2]), torch.Generator().manual_seed(1))
    measure = CosineSimilarityLoss(contrastive.Embeddings())  # type: ignore[arg-type]
    loss = measure([{"sentence_embedding": embedded[left]}, {"sentence_embedding": embedded[right]}], targets.double())
    parts = [
        (embedded[a] @ embedded[b] / embedded[a].norm() / embedded[b].norm() - target) ** 2
        for a, b, target in zip(left, right, targets.double(), strict=True)
    ]
    expected = torch.stack(parts).mean()
    assert torch.allclose(loss, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(each, embedded, retain_graph=True)[0] for each in (loss, expected)]
    assert torch.allclose(*gradients, rtol=1e-9)


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_a_batch_has_every_class_that_fits_at_least_twice(classes: int) -> None:
    labels = np.repeat(np.arange(classes), 8)
    for places in contrastive.batches(labels, 20, seed=0):
        counts = np.bincount(labels[places], minlength=classes)
        assert len(set(places.tolist())) == len(places) <= contrastive.ROWS
        assert (counts > 0).sum() == min(classes, contrastive.MOST_CLASSES)
        assert counts[counts > 0].min() >= 2


@pytest.fixture(scope="module")
def bert(bodies: Any) -> Path:
    return Path(bodies("bert"))


@pytest.mark.slow
def test_the_body_is_trained_and_the_result_is_the_same_with_and_without_the_cache(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_recipe(tmp_path, bert, labeled(tmp_path))
    found = []
    for name, cache in (("first", "a"), ("cached", "a"), ("again", "b")):
        (tmp_path / cache).mkdir(exist_ok=True)
        monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / cache))
        report = run(load_recipe(str(file), [*SETTINGS, f"output_dir={tmp_path / name}"]))
        assert report["result"]["verified"]["bit_equal"]
        assert report["result"]["head"]["contrastive"]["steps"] == 6
        assert report["result"]["head"]["layer"] == 3
        found.append(weights(tmp_path / name))
    plain = tmp_path / "plain"
    run(load_recipe(str(file), ["strategy={name: head, layer: 3, pooling: mean}", *SETTINGS[1:], f"output_dir={plain}"]))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    moved = [name for name, value in weights(plain).items() if not torch.equal(value, found[0][name])]
    assert len(moved) > 10, "all blocks move"
    assert SentenceTransformer(str(tmp_path / "first" / "final"), device="cpu").encode(["a cat"]).shape == (1, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"many": True}, "several labels per row"),
        ({"numbers": True}, "numbers"),
    ],
)
def test_rows_without_pairs_are_refused(bert: Path, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    if "numbers" in given:
        rows = tmp_path / "rows.csv"
        rows.write_text("text,score\n" + "".join(f"a text {i},{i / 7}\n" for i in range(30)))
    else:
        rows = labeled(tmp_path, **given)
    file = write_recipe(tmp_path, bert, rows)
    task = ["task=regression"] if "numbers" in given else []
    with pytest.raises(UserError, match=words):
        run(load_recipe(str(file), [*SETTINGS, *task, f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_single_row_of_each_label_makes_no_pair() -> None:
    data: Any = type("Data", (), {"collate": type("Collate", (), {"units": None})})
    for labels in ([0, 1, 2], [1, 1, 1]):
        with pytest.raises(UserError, match="at least two labels and two rows of one label"):
            contrastive.check(torch.tensor(labels), data)
