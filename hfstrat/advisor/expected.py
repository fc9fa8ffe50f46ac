"""The expected quality of strategies at the deadline, in the unit of the metric, and how likely each is the best.

No number is given where no measured runs are known: for regressions, several labels per text, a strategy with too few runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hfstrat.advisor import learning, quality, text_scores
from hfstrat.advisor.data import Survey
from hfstrat.advisor.learning import NORMAL_80
from hfstrat.advisor.measured_runs import CLASSES, TEXT, YOURS, Run, shipped
from hfstrat.advisor.quality import SCRATCH, Learned
from hfstrat.tasks import TASKS

NOISE = {CLASSES: 0.01, TEXT: 0.02}  # one point of accuracy, 2 % of the loss
DRAWS = 4000
METRIC = {CLASSES: "accuracy", TEXT: "loss, as a share of the base's"}
WIDER = 0.5  # by which an interval grows with each tenfold beyond the measured sizes


@dataclass(frozen=True)
class Known:
    """What is known of a situation before a run.

    tf_idf, probe: cross-validated accuracies.
    gap: bits per byte that the base needs, divided by those that it expects, minus 1; `base_bits`: those it needs.
    runs: the measured runs to learn from: those that ship, and the user's own.
    curve: accuracy of the probe by its number of examples.
    """

    data: Survey
    tf_idf: float | None = None
    probe: float | None = None
    gap: float | None = None
    base_bits: float | None = None
    ngram: float | None = None
    runs: tuple[Run, ...] = field(default_factory=shipped)
    curve: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """What is expected of a strategy; `value` is None where nothing is known, and `basis` says why.

    value, low, high: in the unit of the metric, with an 80 % interval.
    best: the probability of being the best or within noise of it (a point of accuracy, 2 % of the loss).
    assumed: what is not measured, in words.
    """

    metric: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    best: float | None = None
    higher_is_better: bool = True
    basis: str = ""
    assumed: list[str] = field(default_factory=list)

    def words(self) -> str:
        """'accuracy 91.2% (88.0 to 93.6%)'."""
        if self.value is None or self.low is None or self.high is None:
            return f"quality unknown: {self.basis}"
        return f"{self.metric} {self.value:.1%} ({100 * self.low:.1f} to {self.high:.1%})"

    @property
    def merit(self) -> float:
        """For ranking: higher is better; minus infinity where nothing is known."""
        if self.value is None:
            return -math.inf
        return self.value if self.higher_is_better else -self.value

    def reaches(self, other: Expected) -> bool:
        """Whether this is expected within the interval of the other one."""
        if self.value is None or other.low is None or other.high is None:
            return False
        return self.value >= other.low if self.higher_is_better else self.value <= other.high


def task_of(data: Survey) -> str | None:
    """The kind of measured runs that such data can be compared with; None: there are none."""
    if data.objective != "sft" or data.pictures is not None:
        return None
    if TASKS[data.task].text.generates:
        return TEXT
    return CLASSES if data.labels and not data.many and not data.targets and data.task == "text-classification" else None


def known_of(data: Survey) -> Known:
    """What is known of the data without measuring: the scores of its texts where there are texts."""
    task = task_of(data)
    if task == CLASSES and data.text_labels:
        return Known(data, tf_idf=text_scores.tf_idf(tuple(data.texts), tuple(data.text_labels)))
    return Known(data, ngram=text_scores.ngram_bits(tuple(data.texts)) if task == TEXT and data.texts else None)


@dataclass(frozen=True)
class Plan:
    """A run that is considered: its strategy, the parameters of its model, optimizer steps and the examples in all of them.

    is_solved: its head is solved on frozen features, which is what a probe measures.
    """

    strategy: str
    parameters: float
    is_decoder: bool
    steps: float
    seen: float
    is_solved: bool = False


def expect(plans: Sequence[Plan], known: Known) -> list[Expected]:
    """What is expected of each plan, in their order."""
    task = task_of(known.data)
    if task is None:
        kind = (
            "regressions"
            if known.data.targets
            else "texts with several labels"
            if known.data.many
            else f"task {known.data.task}"
            if known.data.objective == "sft"
            else f"objective {known.data.objective}"
        )
        few = f"there are too few measured runs of {kind} to learn from"
        unknown = Expected(basis=f"no runs of {kind} are known" if known.data.files is None else few)
        return [_of_probe(known) if plan.is_solved and known.curve else unknown for plan in plans]
    guesses = [_guess(plan, known, task) for plan in plans]
    given = [guess for guess in guesses if isinstance(guess, Guess)]
    chances = iter(_chances(given, task))
    found = []
    for guess in guesses:
        if isinstance(guess, str):
            found.append(Expected(basis=guess))
            continue
        low, value, high = (quality.to_unit(task, guess.center + side * guess.half) for side in (-1, 0, 1))
        one = Expected(METRIC[task], value, low, high, next(chances), task == CLASSES, guess.basis, guess.assumed)
        found.append(one)
    return found


def _of_probe(known: Known) -> Expected:
    """The accuracy of a solved head: measured on some examples, and continued to all of them."""
    found, most = learning.continued(known.curve, known.data.rows), max(known.curve)
    basis = f"a probe on {most:,} of {known.data.rows:,} examples, measured here"
    assumed = [] if most >= known.data.rows else ["its learning curve continues to all examples"]
    return Expected(METRIC[CLASSES], *found, basis=basis, assumed=assumed)


@dataclass(frozen=True)
class Guess:
    """A prediction on the scale of the regression.

    half: half the width of the interval; `own`: standard deviation of the part that other strategies do not share.
    """

    center: float
    half: float
    own: float
    basis: str
    assumed: list[str]


def _guess(plan: Plan, known: Known, task: str) -> Guess | str:
    """The prediction, or the reason why there is none."""
    data = known.data
    name = plan.strategy
    asked = Run(
        group=group_of(data),
        source="",
        task=task,
        model="",
        parameters=plan.parameters,
        is_decoder=plan.is_decoder,
        strategy=name,
        rows=float(data.rows),
        classes=max(1, len(data.labels)),
        steps=plan.steps,
        seen=plan.seen,
        tf_idf=known.tf_idf,
        probe=known.probe,
        gap=known.gap,
        base_bits=known.base_bits,
        ngram=known.ngram,
    )
    if task == TEXT and name == SCRATCH and known.ngram is None:
        return "from scratch, a prediction needs the text itself"
    runs = quality.comparable(known.runs, asked)
    if not quality.known(runs, name):
        count = sum(run.strategy == name for run in runs)
        many = {0: "no measured runs", 1: "only one measured run"}.get(count, f"only {count} measured runs")
        return f"{many} of {name} on such data {'is' if count == 1 else 'are'} known"
    learned = quality.learn(runs)
    errors, assumed = learned.errors(name), list[str]()
    center, half, (between, own) = learned.regression.predict(asked), quality.half_width(errors), quality.spread(errors)
    center, half = _of_this_data(asked, center, half, learned, between, own)
    if name == SCRATCH:
        center, more = _against_base(asked, center, assumed, known.runs)
        half = math.hypot(half, NORMAL_80 * more)
        own = half / NORMAL_80
    largest = max(run.parameters for run in runs)
    if plan.parameters > 2 * largest:
        assumed.append(f"measured on models of up to {largest / 1e6:,.0f}M parameters")
        wider = 1 + WIDER * math.log10(plan.parameters / largest)
        half, own = half * wider, own * wider
    sets, mine = {run.group for run in runs}, sum(run.source.startswith(YOURS) for run in runs)
    basis = f"{len(runs)} runs on {len(sets)} data sets" + (f", {mine} of them yours" if mine else "")
    return Guess(center, half, own, basis, assumed)


def group_of(data: Survey) -> str:
    return str(Path(data.source).expanduser().absolute()) if not data.by_hand else data.source


def _of_this_data(
    asked: Run, center: float, half: float, learned: Learned, between: float, within: float
) -> tuple[float, float]:
    """Shift and narrow a prediction by runs on the very same data, as far as errors are shared by the runs of a data set."""
    same = [one.run for one in learned.missed if one.run.group == asked.group]
    if not same:
        return center, half
    errors = [quality.target(run) - learned.regression.predict(run) for run in same]
    trust = between**2 / (between**2 + within**2 / len(errors))
    narrower = math.sqrt((between**2 * (1 - trust) + within**2) / (between**2 + within**2))
    return center + trust * float(np.mean(errors)), half * narrower


def _against_base(asked: Run, center: float, assumed: list[str], runs: Sequence[Run]) -> tuple[float, float]:
    """From bits per byte relative to an n-gram model to a loss relative to the base's; and the uncertainty of that."""
    assert asked.ngram is not None
    if asked.base_bits is not None:
        return center + math.log(asked.ngram / asked.base_bits), 0.0
    ratios = {run.group: math.log(run.base_bits / run.ngram) for run in runs if run.base_bits and run.ngram}
    assumed.append("how well the base knows such text, as on other data sets (--measure finds out)")
    values = list(ratios.values())
    return center - float(np.mean(values)), float(np.std(values))


def _chances(guesses: Sequence[Guess], task: str) -> list[float]:
    """The probability of each to be the best, or within noise of it."""
    if not guesses:
        return []
    source = np.random.default_rng(0)
    drawn = np.stack([guess.center + guess.own * source.standard_normal(DRAWS) for guess in guesses])
    if task == CLASSES:
        shares = 1 / (1 + np.exp(-drawn))
        near = shares >= shares.max(0) - NOISE[task]
    else:
        near = drawn <= drawn.min(0) + math.log1p(NOISE[task])
    return [float(row.mean()) for row in near]


def tied(first: Expected, other: Expected) -> bool:
    """Whether two strategies are not told apart: the other is nearly as likely the best."""
    return first.best is not None and other.best is not None and other.best >= first.best / 2
