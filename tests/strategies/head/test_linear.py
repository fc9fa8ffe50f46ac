"""Linear heads against slow references: refits without each row, gradients by autograd in float64, scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from hfstrat.strategies.head import linear


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of different spread and mean, which partly separate three classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 6, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0, 1.0]) + 3
    noise = torch.randn(150, generator=generator)
    labels = (x[:, 0] + noise > 3).long() + (x[:, 1] / 5 + noise > 1).long()
    return x, labels


def objective(layer: linear.Linear, x: torch.Tensor, labels: torch.Tensor, strength: float, bias: bool) -> torch.Tensor:
    """The formula of the docstring, on standardized features."""
    scale = linear.Scale.of(x, centered=bias)
    weight = layer.weight * scale.spread
    logits = layer.logits(x.double())
    if labels.dim() == 2:
        loss = functional.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").sum(1).mean()
    else:
        loss = functional.cross_entropy(logits, labels)
    return loss + strength / 2 * weight.square().sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_the_optimum_has_no_slope(rows: tuple[torch.Tensor, torch.Tensor], several: bool, bias: bool) -> None:
    x, labels = rows
    if several:
        labels = torch.stack([labels > 0, labels > 1, x[:, 3] > 3], dim=1).float()
    layer, strength = linear.fit_logistic(x, labels, 3, 1e-2, bias)
    assert strength == 1e-2
    assert (layer.bias is not None) == bias
    weight = layer.weight.clone().requires_grad_()
    shift = None if layer.bias is None else layer.bias.clone().requires_grad_()
    objective(linear.Linear(weight, shift), x, labels, strength, bias).backward()
    spread = linear.Scale.of(x, centered=bias).spread
    assert weight.grad is not None
    assert (weight.grad / spread).abs().max() < 5e-4
    assert shift is None or (shift.grad is not None and shift.grad.abs().max() < 1e-4)


def test_it_is_scikit_learns_solution(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, labels = rows
    layer, _ = linear.fit_logistic(x, labels, 3, 1e-2)
    standard = linear.Scale.of(x).apply(x.double()).numpy()
    theirs = sklearn.LogisticRegression(C=1 / (len(x) * 1e-2), tol=1e-10, max_iter=5000).fit(standard, labels.numpy())
    ours = layer.logits(x.double())
    said = torch.as_tensor(theirs.decision_function(standard))
    torch.testing.assert_close(ours - ours.mean(1, keepdim=True), said - said.mean(1, keepdim=True), rtol=0, atol=2e-3)


def test_left_out_predictions_are_those_of_refits(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The shortcut against fitting as often as there are rows. The strength, the mean and the scale are those of all rows."""
    x, labels = rows[0][:40], rows[1][:40]
    targets = linear.targets_of(labels, 3)
    said = linear.leave_one_out(x, targets)
    z = linear.Scale.of(x).apply(x.double())
    z1 = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], dim=1)
    wanted = (2 * targets - 1).double()
    mean_eigenvalue = torch.linalg.svdvals(z).square().mean()
    references = []
    for ridge in linear.RIDGES:
        penalty = torch.eye(7, dtype=z.dtype) * ridge * mean_eigenvalue
        penalty[-1, -1] = 0
        found = []
        for row in range(len(z)):
            kept = torch.arange(len(z)) != row
            a = z1[kept]
            found.append(z1[row] @ torch.linalg.solve(a.T @ a + penalty, a.T @ wanted[kept]))
        references.append(torch.stack(found))
    best = min(references, key=lambda reference: float((reference - wanted).square().mean()))
    torch.testing.assert_close(said.double(), best, rtol=1e-3, atol=1e-3)


def test_many_classes_go_in_chunks(monkeypatch: pytest.MonkeyPatch, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = rows
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = linear.loss_and_gradient(x.double(), labels, weights, True)
    monkeypatch.setattr(linear, "CHUNK_NUMBERS", 20)
    for one, other in zip(whole, linear.loss_and_gradient(x.double(), labels, weights, True), strict=True):
        torch.testing.assert_close(one, other)


def test_the_penalty_is_chosen_on_rows_that_the_fit_is_not_shown(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Labels that the features do not predict need a strong penalty, those that they predict a weak one."""
    x, _ = rows
    noise = torch.randint(0, 2, (150,), generator=torch.Generator().manual_seed(2))
    _, strong = linear.fit_logistic(x, noise, 2)
    _, weak = linear.fit_logistic(x, (x[:, 0] > 3).long(), 2)
    assert weak < strong


def test_a_feature_that_is_always_the_same_does_no_harm(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = rows
    layer, _ = linear.fit_logistic(torch.cat([x, torch.ones(150, 1)], dim=1), labels, 3, 1e-2)
    assert layer.weight.isfinite().all()


def test_views_of_an_example_are_held_out_together() -> None:
    """With each row three times, the penalty and the held-out logits are those of the rows once; otherwise a row's copies in
    the fit would tell its label."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 40, generator=generator)
    labels = (x[:, 0] + 2 * torch.randn(60, generator=generator) > 0).long()
    layer, strength = linear.fit_logistic(x, labels, 2)
    same, again = linear.fit_logistic(x.repeat(3, 1), labels.repeat(3), 2, views=3)
    assert again == strength
    assert torch.allclose(same.logits(x), layer.logits(x), atol=1e-4)
    _, leaking = linear.fit_logistic(x.repeat(3, 1), labels.repeat(3), 2)
    assert leaking < strength
    marks = torch.nn.functional.one_hot(labels, 2).float()
    once = linear.out_of_fold(x, marks, 2, strength, True)
    views = linear.out_of_fold(x.repeat(3, 1), marks.repeat(3, 1), 2, strength, True, views=3)
    assert torch.allclose(views, once.repeat(3, 1), atol=1e-3)
