"""From a model, data, a machine and a deadline to ranked strategies, each with its reason and the evidence."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field, replace
from typing import Any

from hfstrat.advisor import candidates, fitting, hardware, memory, rules, speed
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.data import Survey
from hfstrat.advisor.fitting import Fit
from hfstrat.advisor.hardware import Device, Sharing
from hfstrat.advisor.rules import Facts, Score
from hfstrat.advisor.shapes import VALIDATED, Model
from hfstrat.advisor.speed import Rate, Work
from hfstrat.errors import UserError

EVALUATIONS = 6.0  # before, four times on the way, after
LEAST_STEPS = {True: 1.0, False: 20.0}  # below it a run is no training: with pretrained weights, and from scratch
ALONE, NO_RATE = Sharing(), Rate(0.0, "")
STANDING = {"fits": 0, "fits with": 0, "fits with more": 1, "does not fit": 2}


@dataclass
class Situation:
    """All that was given, and what was measured of it."""

    model: Model
    data: Survey
    device: Device
    limit: float
    sharing: Sharing = ALONE
    time: float | None = None
    goal: str = "quality"
    rate: Rate = NO_RATE
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def compute(self) -> int:
        return 2 if not self.device.is_cpu or hardware.has_bfloat16() else 4

    @property
    def eval_tokens(self) -> float:
        rows = min(1000.0, max(1.0, 0.05 * self.data.rows))
        return rows * self.data.mean_length


@dataclass
class Advice:
    """One strategy here. `epochs` are those that fit into the time."""

    name: str
    candidate: Candidate
    fit: Fit | None = None
    score: Score | None = None
    work: Work | None = None
    seconds: float = 0.0
    epochs: float = 0.0
    steps: float = math.inf  # of 16 rows, were all of the time after the start training
    in_time: bool = True
    time_words: str = ""
    band: float | None = None
    rank: int = 0
    refused: str = ""  # why no recipe was written for it

    @property
    def can(self) -> bool:
        return not self.candidate.reason

    @property
    def fits(self) -> bool:
        return self.fit is not None and self.fit.fits_here and self.in_time

    def order(self) -> tuple[int, float]:
        if self.fit is None or self.score is None:
            return (9, 0.0)
        return (STANDING[self.fit.kind] + 2 * (not self.in_time), -self.score.points)


def decide(situation: Situation, wanted: list[str]) -> list[Advice]:
    """The strategies, the best first; those that cannot be had last, with the reason."""
    found = [_one(situation, name) for name in wanted]
    able = [advice for advice in found if advice.can]
    if not able:
        raise UserError(f"--model: {situation.model.name}: no strategy can do this: {found[0].candidate.reason}")
    seconds = {advice.name: advice.work.training if advice.work else 1.0 for advice in able}
    sizes = {advice.name: advice.candidate.artefact_bytes for advice in able}
    for advice in able:
        advice.score = rules.score(facts_of(situation, advice, seconds, sizes), advice.name)
    found.sort(key=Advice.order)
    for number, advice in enumerate(found, 1):
        advice.rank = number
    return found


def _one(situation: Situation, name: str) -> Advice:
    data, most = situation.data, float("inf")
    while True:
        candidate = candidates.make(name, situation.model, data, most)
        advice = Advice(name, candidate)
        if not advice.can or candidate.model is None or candidate.learning is None:
            return advice
        quantizes = _quantizes()
        advice.fit = fitting.fit(
            candidate, data, situation.device, situation.limit, situation.sharing, situation.compute, quantizes
        )
        _set_time(situation, advice)
        good = advice.fits and advice.steps >= rules.ENOUGH[True]
        if good or candidate.strategy is None or candidate.strategy.needs_weights or most <= candidates.SMALLEST:
            return advice
        # a model from scratch may be as small as it has to be
        most = max(candidates.SMALLEST, candidates.parameters_of(candidate) / 2)


def _quantizes() -> bool:
    """Whether this hfstrat has `model.quantization`, and bitsandbytes is there."""
    from hfstrat.recipe.schema import Model as Section

    return "quantization" in Section.model_fields and importlib.util.find_spec("bitsandbytes") is not None


def _set_time(situation: Situation, advice: Advice) -> None:
    """What a run takes, and how much of it fits into the time."""
    candidate, data = advice.candidate, situation.data
    assert candidate.model is not None
    assert candidate.learning is not None
    assert advice.fit is not None
    load = work_of(candidate, data, advice.fit.shape.recompute, candidate.epochs)
    advice.work, rate = load, _rate(situation, advice)
    advice.band = rate.band
    processes = situation.sharing.processes

    def takes(epochs: float) -> float:
        return speed.seconds(load, data.tokens, epochs, situation.eval_tokens, EVALUATIONS, rate.value * processes)

    whole, limit = takes(candidate.epochs), situation.time
    advice.seconds, advice.epochs = whole, candidate.epochs
    if limit is not None and load.training:
        left = max(0.0, limit - speed.START_SECONDS)
        advice.steps = left * rate.value * processes / (load.training * data.mean_length * fitting.GLOBAL_BATCH)
    if limit is None or whole <= limit:
        return
    each = load.training * data.tokens / (rate.value * processes)
    possible = (limit - takes(0.0)) / each if each else 0.0
    steps = possible * data.rows / fitting.GLOBAL_BATCH
    least = LEAST_STEPS[candidate.strategy is not None and candidate.strategy.needs_weights]
    if steps >= min(least, data.rows / fitting.GLOBAL_BATCH):
        advice.seconds, advice.epochs = limit, possible
        advice.time_words = f"{possible:.2g} of {candidate.epochs:g} epochs in the time"
    else:
        advice.in_time = False
        advice.time_words = "not in the time"


def work_of(candidate: Candidate, data: Survey, recompute: bool, epochs: float) -> Work:
    """Operations a token; a head that is solved takes no steps, and is evaluated on features that are there."""
    assert candidate.model is not None
    assert candidate.learning is not None
    load = speed.work(candidate.model, candidate.learning, data.mean_length, data.supervised_share, recompute, epochs)
    return load._replace(training=0.0, evaluation=0.0) if candidate.learning.body_once and data.labels else load


def _rate(situation: Situation, advice: Advice) -> Rate:
    """Measured on this strategy, on another one here, or the machine's."""
    rates: dict[str, float] = situation.measured.get("rates", {})
    if advice.name in rates:
        return Rate(rates[advice.name], "a few real steps of it here", memory.time_band("measured"))
    if rates:
        middle = sorted(rates.values())[len(rates) // 2]
        return Rate(middle, "a few real steps of other strategies here", memory.time_band("others"))
    return situation.rate.of(advice.candidate.model.width) if advice.candidate.model else situation.rate


def facts_of(situation: Situation, advice: Advice, seconds: dict[str, float], sizes: dict[str, float]) -> Facts:
    """What the rules look at for one strategy."""
    data = situation.data
    footprint = advice.candidate.footprint
    adapters = footprint.trainable if footprint and advice.candidate.learning and advice.candidate.learning.rank else 0
    floor = min((value for value in seconds.values() if value), default=1.0)
    return Facts(
        task=data.task,
        goal=situation.goal,
        rows=data.rows,
        classes=max(1, len(data.labels)),
        tokens=data.tokens,
        parameters=situation.model.parameters,
        scratch_parameters=situation.model.parameters,
        adapter_parameters=float(adapters or (footprint.trainable if footprint else 1)),
        unlike=situation.measured.get("unlike"),
        probe_gain=situation.measured.get("probe_gain"),
        steps=advice.steps,
        seconds={name: max(value, floor / 8) for name, value in seconds.items()},
        artefact=sizes,
    )


def caveats(situation: Situation) -> list[str]:
    """Where the predictions leave what they were validated on."""
    found, model = [], situation.model
    if not situation.device.is_cpu:
        found.append("memory on a GPU follows the same terms, but its constants are not validated here")
    elif model.family not in VALIDATED:
        found.append(f"memory was validated on {' and '.join(VALIDATED)} models, not on {model.family or 'this family'}")
    if situation.sharing.processes > 1:
        found.append(f"how {situation.sharing.kind} shares memory is by its documentation, not validated here")
    if situation.sharing.processes > 1 and situation.device.is_cpu:
        found.append("processes on a CPU share its memory and its cores: they make nothing faster here")
    if model.parameters > 500e6 and situation.device.is_cpu:
        found.append("memory was validated on models of up to 135M parameters")
    if not situation.measured:
        found.append("nothing was measured on these rows: the ranking is by rules alone (--measure 30s measures)")
    return found


def narrowed(situation: Situation, **changes: Any) -> Situation:
    return replace(situation, **changes)
