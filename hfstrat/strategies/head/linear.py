"""Linear classifiers on fixed features, solved rather than trained: the optimum, independent of the order of examples.

Ridge regression with exact leave-one-out predictions (Hastie et al., The Elements of Statistical Learning, 7.10) compares
many features quickly; logistic regression with an L2 penalty is published. Both work on standardized features, and return a
linear layer for the raw ones. Implemented in PyTorch, without further dependencies: for convex problems of this size L-BFGS in
float64 finds scikit-learn's solution (checked by a test), and sums over chunks of examples bound the memory of many classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from hfstrat.models.output_scale import Units, constant_direction

CONSTANT_ROWS = 512  # from which the direction that stands for a missing bias is found
CHUNK_NUMBERS = 2**23  # logits in memory at a time
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the penalty, per example
FOLDS = 5  # of out-of-fold predictions
HISTORY = 10  # steps in the memory of L-BFGS; each takes two copies of the weights
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # multiples of the mean eigenvalue


class Linear(NamedTuple):
    """`weight` `[K, H]` and `bias` `[K]` (or None) for raw features, float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """`[n, K]` in the weight's precision."""
        return functional.linear(features.to(self.weight.dtype), self.weight, self.bias)


class Scale(NamedTuple):
    """Mean and standard deviation of each feature, `[H]`: `(x - mean) / spread` is standardized."""

    mean: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, centered: bool = True) -> Scale:
        """The scale of features; not centered for a layer without a bias."""
        wide = features.double()
        mean = wide.mean(0) if centered else torch.zeros_like(wide[0])
        spread = (wide - mean).square().mean(0).sqrt()
        return cls(mean, torch.where(spread > 1e-6 * spread.max().clamp(min=1e-12), spread, torch.ones_like(spread)))

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        return ((features.double() - self.mean) / self.spread).to(features.dtype)

    def fold(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """The layer for raw features that equals one for standardized features."""
        raw = weight.double() / self.spread
        return Linear(raw, None if bias is None else bias.double() - raw @ self.mean)


def targets_of(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels `[n]` as one-hot rows `[n, K]` in float32; several labels per example (`[n, K]` of 0 and 1) are unchanged."""
    return labels.float() if labels.dim() == 2 else functional.one_hot(labels.long(), classes).float()


def leave_one_out(features: torch.Tensor, targets: torch.Tensor, numbers: bool = False) -> torch.Tensor:
    """Predictions of ridge regression for each example when fitted on all others, `[n, K]`: numbers, or positive for yes.

    The strength with the smallest squared error of these predictions is used.
    """
    x = Scale.of(features).apply(features).float()
    wanted = targets if numbers else 2 * targets - 1
    mean = wanted.mean(0)
    left, values, _ = torch.linalg.svd(x, full_matrices=False)
    projected = left.T @ (wanted - mean)
    best, found = float("inf"), wanted
    for ridge in RIDGES:
        shrink = values.square() / (values.square() + ridge * float(values.square().mean()))
        fitted = mean + left @ (shrink[:, None] * projected)
        leverage = (left.square() * shrink).sum(1) + 1 / len(x)
        held_out = wanted - (wanted - fitted) / (1 - leverage).clamp(min=1e-6)[:, None]
        if (error := float((wanted - held_out).square().mean())) < best:
            best, found = error, held_out
    return found


def fit_ridge(features: torch.Tensor, targets: torch.Tensor, strength: float | None, bias: bool) -> tuple[Linear, float]:
    """Ridge regression of numbers `[n, K]`, in float64.

    Minimizes the mean squared error over rows plus `strength` times the squared weights of standardized features;
    scikit-learn's `alpha` is `n * strength`. The bias is not penalized.

    Args:
        features: `[n, H]`, float32.
        strength: by default the one of `STRENGTHS` with the smallest exact leave-one-out error.
        bias: whether there is one.

    Returns:
        The layer for raw features, and the strength.
    """
    scale = Scale.of(features, centered=bias)
    x, wanted = scale.apply(features.double()), targets.double()
    mean = wanted.mean(0) if bias else torch.zeros_like(wanted[0])
    values, vectors = torch.linalg.eigh(x.T @ x)
    turned = x @ vectors
    projected = turned.T @ (wanted - mean)
    found = []
    for each in STRENGTHS if strength is None else (strength,):
        inverse = 1 / (values.clamp(min=0) + len(x) * each)
        leverage = (turned.square() @ inverse) + bias / len(x)
        residual = wanted - mean - turned @ (inverse[:, None] * projected)
        error = float((residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean())
        found.append((error, each, inverse))
    _, strength, inverse = min(found, key=lambda one: one[0])
    return scale.fold((vectors @ (inverse[:, None] * projected)).T, mean if bias else None), strength


def solve(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strength: float | None,
    bias: bool,
    units: Units | None,
    seed: int,
    row_weights: torch.Tensor | None = None,
    views: int = 1,
) -> tuple[Linear, float]:
    """The optimal head for raw features: `fit_logistic`, or ridge regression where the outputs have `units`.

    Args:
        labels: as in a batch; with `units` standardized targets. The outputs of the head are in their original units.
        row_weights: how much each example counts in a logistic regression, `[n]`; None: equally.
    """
    if units is None:
        return fit_logistic(features, labels, classes, strength, bias, seed, row_weights, views)
    constant, targets = None, labels.double()
    if not bias:
        constant = constant_direction(features[:CONSTANT_ROWS])
        targets = targets + (units.mean / units.std) * (1 - features.double() @ constant)[:, None]
    layer, strength = fit_ridge(features, targets, strength, bias)
    return Linear(*units.to_original(layer.weight, layer.bias, constant)), strength


def fit_logistic(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strength: float | None = None,
    bias: bool = True,
    seed: int = 0,
    row_weights: torch.Tensor | None = None,
    views: int = 1,
) -> tuple[Linear, float]:
    """Fit a logistic regression: multinomial for labels `[n]`, one per label for `[n, K]` of 0 and 1.

    Minimizes the mean loss over examples (summed over labels if there are several) plus `strength / 2` times the squared
    weights of standardized features; scikit-learn's `C` is `1 / (n * strength)`. The bias is not penalized.

    Args:
        features: `[n, H]`, float32.
        strength: by default the one of `STRENGTHS` with the lowest loss on a held-out fifth of the examples.
        bias: whether the layer has one.
        row_weights: how much the loss of each example counts, `[n]`, of mean 1; None: equally.
        views: how many rows each example has: rows `i`, `i + n / views`, ... are of the same one, which is held out as a whole.

    Returns:
        The layer for raw features, and the strength.
    """
    scale = Scale.of(features, centered=bias)
    x = scale.apply(features)
    start = None
    if strength is None:
        strength, start = choose_strength(x, labels, classes, bias, seed, row_weights, views)
    start = torch.zeros(classes, x.shape[1] + bias) if start is None else start
    # float32 first, float64 for the last steps
    near = minimize(x, labels, start.float(), strength, bias, tolerance=1e-4, row_weights=row_weights)
    exact = minimize(x.double(), labels, near.double(), strength, bias, tolerance=1e-5, row_weights=row_weights)
    return scale.fold(*split(exact, bias)), strength


def out_of_fold(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strength: float | None,
    bias: bool,
    views: int = 1,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of logistic regressions for the examples that each was not fitted on, `[n, K]` in float32.

    Args:
        features, labels: `[n, H]`, and those of `fit_logistic`.
        strength: of the penalty; by default chosen for each part.
        views, row_weights: as for `fit_logistic`.
    """
    examples = len(features) // views
    part = (torch.randperm(examples, generator=torch.Generator().manual_seed(0)) % FOLDS).repeat(views)
    found = torch.empty(len(features), classes)
    for fold in range(FOLDS):
        held = part == fold
        weights = None if row_weights is None else row_weights[~held]
        layer, _ = fit_logistic(features[~held], labels[~held], classes, strength, bias, 0, weights, views)
        found[held] = layer.logits(features[held]).float()
    return found


def choose_strength(
    x: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    bias: bool,
    seed: int,
    row_weights: torch.Tensor | None = None,
    views: int = 1,
) -> tuple[float, torch.Tensor]:
    """The strength with the lowest held-out loss, and its weights; each fit starts from the previous one.

    Of examples that are held out the first view counts, which is the example itself.
    """
    examples = len(x) // views
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    held, rest = order[: max(1, examples // 5)], order[max(1, examples // 5) :]
    kept = torch.cat([rest + view * examples for view in range(views)])
    of_kept, of_held = (None if row_weights is None else row_weights[part] for part in (kept, held))
    weights = torch.zeros(classes, x.shape[1] + bias)
    found: list[tuple[float, float, torch.Tensor]] = []
    for strength in sorted(STRENGTHS, reverse=True):
        weights = minimize(x[kept], labels[kept], weights, strength, bias, tolerance=1e-3, row_weights=of_kept)
        loss = float(loss_and_gradient(x[held], labels[held], weights, bias, of_held)[0]) / len(held)
        found.append((loss, strength, weights))
        if loss > min(found)[0] * 1.05:
            break  # the loss is nearly convex along this path
    _, strength, weights = min(found, key=lambda each: each[0])
    return strength, weights


def split(weights: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (weights[:, :-1], weights[:, -1]) if bias else (weights, None)


def loss_and_gradient(
    x: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, bias: bool, row_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss and its gradient `[K, H + bias]`, a chunk of examples at a time.

    Args:
        row_weights: how much each example with one label counts, `[n]`; None: equally.
    """
    weight, shift = split(weights, bias)
    total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(weights)
    rows = max(1, CHUNK_NUMBERS // len(weights))
    for start in range(0, len(x), rows):
        part, wanted = x[start : start + rows], labels[start : start + rows]
        logits = functional.linear(part, weight, shift)
        if labels.dim() == 2:
            wanted = wanted.to(logits.dtype)
            total += functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum").double()
            slope = logits.sigmoid_().sub_(wanted)
        else:
            logprobs = logits.log_softmax(-1)
            mine = logprobs.gather(1, wanted[:, None])[:, 0].double()
            each = None if row_weights is None else row_weights[start : start + rows]
            total -= (mine if each is None else mine * each.double()).sum()
            slope = logprobs.exp_()
            slope[torch.arange(len(wanted)), wanted] -= 1
            slope = slope if each is None else slope.mul_(each.to(slope.dtype)[:, None])
        gradient[:, : x.shape[1]] += slope.T @ part
        if bias:
            gradient[:, -1] += slope.sum(0)
    return total, gradient


def minimize(
    x: torch.Tensor,
    labels: torch.Tensor,
    start: torch.Tensor,
    strength: float,
    bias: bool,
    tolerance: float,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights `[K, H + bias]` at which no entry of the objective's gradient is above `tolerance`, from `start`."""
    weights = start.clone().requires_grad_()
    penalty = torch.full_like(start, strength)
    if bias:
        penalty[:, -1] = 0
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> torch.Tensor:
        total, gradient = loss_and_gradient(x, labels, weights, bias, row_weights)
        weights.grad = gradient.div_(len(x)) + penalty * weights
        return total / len(x) + (penalty * weights * weights).sum().double() / 2

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
