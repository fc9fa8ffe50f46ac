"""Expected quality of a strategy, learned from measured runs: a ridge regression, and what it missed on data sets left out.

Accuracies are predicted as log odds, losses as the logarithm of their ratio to the loss of the base (of `scratch`: of bits per
byte to those of an n-gram model). What more steps change has coefficients of one sign, so that more time is never predicted to
be worse. The interval is conformal: 80 % of the errors on data sets that the regression had not seen were smaller (Vovk et al.
2005; Barber et al. 2021, arXiv 1905.02928, with data sets in place of examples). How much is known before a run decides which
features there are: sizes alone; TF-IDF on the labels or an n-gram model of the text; what `--measure` finds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hfstrat.advisor.measured_runs import CLASSES, TEXT, Run

COVERAGE = 0.8
LEAST_RUNS, LEAST_SETS = 4, 3  # with a strategy, for a prediction
PENALTY = {CLASSES: 3.0, TEXT: 3.0}
SEEN, STEPS = 40.0, 60.0  # examples of each class in training, and steps, with which about half of a shortage is over
STEPS_OF_TEXT = 40.0
MEASURED_SIZES = (260e3, 135e6)  # parameters of language models, beyond which no trend is assumed
TUNED = ("partial", "lora", "full")
SCRATCH, DISTILL = "scratch", "distill"
Features = dict[str, float]  # the names of those whose coefficient must not be negative begin with '+'


def log_odds(share: float) -> float:
    limited = min(0.995, max(0.005, share))
    return math.log(limited / (1 - limited))


def shortage(needed: float, given: float) -> float:
    """0 if far more is given than needed; falls without limit where less is."""
    return -math.log1p(needed / max(1e-9, given))


def of_classes(run: Run) -> Features:
    """Of a classification: how hard the data set is, how few examples there are, and how few of them a run sees."""
    name, tuned = run.strategy, run.strategy in TUNED
    per_class = math.log(run.rows / run.classes / 50)
    found = {
        "1": 1.0,
        "classes": math.log(run.classes),
        "decoder": float(run.is_decoder),
        f"is {name}": 1.0,
        "+per class": per_class,
        "+per class tuned": per_class * tuned,
        "+per class full": per_class * (name == "full"),
    }
    if run.tf_idf is not None:
        found |= {"tf_idf": log_odds(run.tf_idf)}
    if run.probe is not None:
        found |= {"probe": log_odds(run.probe)}
    if tuned:
        examples = shortage(SEEN, run.seen / run.classes)
        found |= {"decoder tuned": float(run.is_decoder), "+seen": examples, f"+seen {name}": examples}
        found |= {"+steps": shortage(STEPS, run.steps)}
    return found


def of_text(run: Run) -> Features:
    """Of a language model: the strategy, its steps, and how unfamiliar the text is to the base."""
    name, progress = run.strategy, math.log1p(run.steps / STEPS_OF_TEXT)
    found = {"1": 1.0, f"is {name}": 1.0, "+steps": -progress}
    if name == DISTILL:
        size = min(MEASURED_SIZES[1], max(MEASURED_SIZES[0], run.parameters))
        found |= {"+steps distill": -progress, "parameters distill": math.log10(size / 1e7)}
    if run.gap is not None and name != SCRATCH:
        gap = math.log1p(max(0.0, run.gap))
        found |= {"gap": gap, "gap head": gap * (name == "head"), "gap distill": gap * (name == DISTILL)}
    return found


FEATURES: dict[str, Callable[[Run], Features]] = {CLASSES: of_classes, TEXT: of_text}


def target(run: Run) -> float:
    """The number that is predicted for a measured run."""
    assert run.value is not None
    if run.task == CLASSES:
        return log_odds(run.value)
    against = run.ngram if run.strategy == SCRATCH else run.base
    assert against is not None
    return math.log(run.value / against)


def reduced(run: Run, like: Run) -> Run:
    """The run with only the scores that are known of the other one."""
    return run._replace(
        tf_idf=None if like.tf_idf is None else run.tf_idf,
        probe=None if like.probe is None else run.probe,
        gap=None if like.gap is None else run.gap,
    )


def usable(run: Run, like: Run) -> bool:
    """Whether a measured run has everything that is known of the one to predict."""
    if run.task != like.task or run.value is None or (run.strategy == SCRATCH) != (like.strategy == SCRATCH):
        return False
    needed = ("tf_idf", "probe") if run.task == CLASSES else () if run.strategy == SCRATCH else ("gap",)
    if any(getattr(like, name) is not None and getattr(run, name) is None for name in needed):
        return False
    return run.task == CLASSES or (run.ngram if run.strategy == SCRATCH else run.base) is not None


class Regression:
    """A ridge regression on named features, standardized, some with coefficients that are not negative."""

    def __init__(self, runs: Sequence[Run]) -> None:
        from sklearn.linear_model import Ridge

        task = runs[0].task
        found = [FEATURES[task](run) for run in runs]
        self.features = FEATURES[task]
        self.names = sorted({name for each in found for name in each} - {"1"})
        matrix = np.asarray([[each.get(name, 0.0) for name in self.names] for each in found])
        self.scale = np.maximum(matrix.std(0), 1e-9)
        self.center = np.asarray(
            [
                0.0 if name.startswith("+") or " " in name else column.mean()
                for name, column in zip(self.names, matrix.T, strict=True)
            ]
        )
        free = np.asarray([not name.startswith("+") for name in self.names], dtype=bool)
        scaled = (matrix - self.center) / self.scale
        model = Ridge(alpha=PENALTY[task], positive=True).fit(np.hstack([scaled, -scaled[:, free]]), self._offset(runs))
        weights = model.coef_[: len(self.names)].copy()
        weights[free] -= model.coef_[len(self.names) :]
        self.weights, self.intercept = weights, float(model.intercept_) + self.middle

    def _offset(self, runs: Sequence[Run]) -> np.ndarray:
        values = np.asarray([target(run) for run in runs])
        self.middle = float(values.mean())
        return values - self.middle

    def predict(self, run: Run) -> float:
        found = self.features(run)
        row = np.asarray([found.get(name, 0.0) for name in self.names])
        return self.intercept + float(((row - self.center) / self.scale) @ self.weights)


class Missed(NamedTuple):
    """The error of a prediction for a run of a data set that was left out: measured minus predicted."""

    run: Run
    predicted: float
    error: float


class Learned(NamedTuple):
    """A regression, and its errors on data sets left out."""

    regression: Regression
    missed: tuple[Missed, ...]

    def errors(self, strategy: str) -> list[Missed]:
        """Those of strategies that are predicted about as well as this one: new and shrunk models are predicted worse."""
        return [each for each in self.missed if family(each.run.strategy) == family(strategy)]


def family(strategy: str) -> str:
    return strategy if strategy in (SCRATCH, DISTILL) else "pretrained"


@lru_cache(maxsize=64)
def learn(runs: tuple[Run, ...]) -> Learned:
    """Fit the runs, and once more without each data set."""
    missed = []
    for group in sorted({run.group for run in runs}):
        rest = [run for run in runs if run.group != group]
        without = Regression(rest) if rest else None
        for run in runs:
            if run.group == group and without is not None:
                predicted = without.predict(run)
                missed.append(Missed(run, predicted, target(run) - predicted))
    return Learned(Regression(list(runs)), tuple(missed))


def half_width(missed: Sequence[Missed]) -> float:
    """Half the width of the 80 % interval."""
    return conformal(np.asarray([each.error for each in missed]))


def spread(missed: Sequence[Missed]) -> tuple[float, float]:
    """Standard deviations of the error that all runs of a data set share, and of the rest."""
    shared = defaultdict(list)
    for each in missed:
        shared[each.run.group].append(each.error)
    sets = [np.asarray(found) for found in shared.values()]
    rest = sum(float(((found - found.mean()) ** 2).sum()) for found in sets)
    within = rest / max(1, len(missed) - len(sets))
    between = float(np.mean([found.mean() ** 2 - within / len(found) for found in sets]))
    return math.sqrt(max(between, 1e-4)), math.sqrt(max(within, 1e-4))


def conformal(errors: np.ndarray) -> float:
    """The size that 80 % of the errors do not exceed, with the correction for a finite number of them."""
    level = min(1.0, math.ceil((len(errors) + 1) * COVERAGE) / len(errors))
    return float(np.quantile(np.abs(errors), level))


def known(runs: Sequence[Run], strategy: str) -> bool:
    """Whether there are enough runs of the strategy, on enough data sets."""
    with_it = [run for run in runs if run.strategy == strategy]
    return len(with_it) >= LEAST_RUNS and len({run.group for run in with_it}) >= LEAST_SETS


def comparable(runs: Sequence[Run], like: Run) -> tuple[Run, ...]:
    """The runs of which everything is known that is known of `like`, with only that."""
    return tuple(reduced(run, like) for run in runs if usable(run, like))


def coverage(learned: Learned) -> float:
    """The share of measurements within an interval that is computed from the errors on other data sets alone."""
    inside = 0
    for each in learned.missed:
        others = [one for one in learned.errors(each.run.strategy) if one.run.group != each.run.group]
        inside += bool(others) and abs(each.error) <= half_width(others)
    return inside / len(learned.missed)


def to_unit(task: str, value: float) -> float:
    """An accuracy, or a share of the base's loss, from the number that is predicted."""
    return 1 / (1 + math.exp(-value)) if task == CLASSES else math.exp(value)
