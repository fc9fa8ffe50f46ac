"""Advice in five steps: candidates -> fit into memory -> time -> score -> rank.

Each step is a function of a `Situation` and of the frozen result of the step before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hfstrat.advisor import candidates, hardware, memory, rules, speed
from hfstrat.advisor.architecture import VALIDATED, Model
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.data import Survey
from hfstrat.advisor.hardware import Device, Sharing, import_bytes, time_band
from hfstrat.advisor.memory import Prediction, Shape
from hfstrat.advisor.rules import Facts, Score
from hfstrat.advisor.speed import Rate, Work
from hfstrat.errors import UserError
from hfstrat.trainer.plan import HEADROOM, modest_eval_batch, modest_micro_batch

GLOBAL_BATCH = 16
EVALUATIONS = 6.0  # one before training, four during, one after
LEAST_STEPS = {True: 1.0, False: 20.0}  # fewer are not worth a run: with pretrained weights, and from scratch
PROCESSES = (2, 4, 8, 16, 32, 64, 128)
NF4_BYTES = 0.57  # per weight: 4 bits and the scales of blocks of 64 (arXiv 2305.14314)
ALONE, NO_RATE = Sharing(), Rate(0.0, "")

Kind = Literal["fits", "fits with", "fits with more", "does not fit"]
ORDER: dict[Kind, int] = {"fits": 0, "fits with": 0, "fits with more": 1, "does not fit": 2}


@dataclass(frozen=True)
class Measured:
    """What `--measure` found: operations per second by strategy, facts for the rules (None: not measured), lines of text."""

    rates: dict[str, float]
    domain_gap: float | None = None
    probe_gain: float | None = None
    lines: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """What advice is given for.

    limit: bytes of memory of one device.
    time: seconds; None: no limit.
    quantizes: whether frozen weights can be quantized here.
    """

    model: Model
    data: Survey
    device: Device
    limit: float
    sharing: Sharing = ALONE
    time: float | None = None
    goal: str = "quality"
    rate: Rate = NO_RATE
    quantizes: bool = False
    measured: Measured | None = None

    @property
    def compute(self) -> int:
        """Bytes per number in the forward pass."""
        return 2 if not self.device.is_cpu or hardware.has_bfloat16() else 4

    @property
    def eval_tokens(self) -> float:
        rows = min(1000.0, max(1.0, 0.05 * self.data.rows))
        return rows * self.data.mean_length


@dataclass(frozen=True)
class Fitted:
    """A candidate with the first way in which it fits into memory.

    kind: as it is, with settings, with more processes, or not at all; `words` name the settings.
    settings: keys of `training:`.
    """

    candidate: Candidate
    kind: Kind
    words: str
    prediction: Prediction
    shape: Shape
    settings: dict[str, object]

    @property
    def peak(self) -> float:
        """Peak memory of the process as in `report.json`: on a CPU it includes the imports."""
        return self.prediction.total + import_bytes(self.shape.on_cpu)

    @property
    def fits_here(self) -> bool:
        return self.kind in ("fits", "fits with")


@dataclass(frozen=True)
class Timed:
    """A fitted candidate with its training time.

    epochs: as many as the time allows.
    steps: optimizer steps of 16 examples that the time would allow; infinite without a limit.
    late: the shortest run that is worth it, in multiples of the time limit, where it exceeds that.
    words: what the time limit changes; empty: nothing.
    band: relative error of such times; None: not validated.
    """

    fitted: Fitted
    work: Work
    seconds: float
    epochs: float
    steps: float = math.inf
    in_time: bool = True
    late: float = 1.0
    words: str = ""
    band: float | None = None

    @property
    def candidate(self) -> Candidate:
        return self.fitted.candidate

    @property
    def fits(self) -> bool:
        """Whether it fits into the memory and the time."""
        return self.fitted.fits_here and self.in_time


@dataclass(frozen=True)
class Scored:
    """A timed candidate with its points."""

    timed: Timed
    score: Score

    @property
    def name(self) -> str:
        return self.timed.candidate.name

    @property
    def candidate(self) -> Candidate:
        return self.timed.candidate

    @property
    def fitted(self) -> Fitted:
        return self.timed.fitted


@dataclass(frozen=True)
class Advice:
    """The possible strategies, best first, and the reason why each of the others is impossible."""

    ranked: tuple[Scored, ...]
    unavailable: dict[str, str]


def decide(situation: Situation, names: Sequence[str]) -> Advice:
    """Rank strategies. Raises UserError if none of them is possible."""
    found, unavailable = propose(situation, names)
    if not found:
        reason = next(iter(unavailable.values()), "no strategy given")
        raise UserError(f"--model: {situation.model.name}: no strategy is possible: {reason}")
    timed = [smaller_if_needed(estimate(fit(candidate, situation), situation), situation) for candidate in found]
    return Advice(rank(score(timed, situation)), unavailable)


def propose(situation: Situation, names: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    """Step 1: the strategies that are possible, and those that are not."""
    found, unavailable = list[Candidate](), dict[str, str]()
    for name in names:
        try:
            found.append(candidates.propose(name, situation.model, situation.data))
        except UserError as error:
            unavailable[name] = str(error).partition(": ")[2] or str(error)
    return found, unavailable


def fit(candidate: Candidate, situation: Situation) -> Fitted:
    """Step 2: the first settings that fit into memory, from the fastest to the most economical."""
    device, sharing = situation.device, situation.sharing
    room = HEADROOM * situation.limit - import_bytes(device.is_cpu)
    tried = [
        (memory.predict(candidate.model, candidate.description, shape, sharing), shape, words)
        for shape, words in _shapes(candidate, situation)
    ]
    for prediction, shape, words in tried:
        if prediction.total <= room:
            kind: Kind = "fits with" if words else "fits"
            return Fitted(candidate, kind, words, prediction, shape, _settings(shape, words))
    least, shape, words = min(tried, key=lambda each: each[0].total)
    for processes in () if device.is_cpu else PROCESSES:  # processes on a CPU share its memory, and FSDP does not run there
        divided = memory.predict(candidate.model, candidate.description, shape, Sharing("fsdp2", processes, True, True, True))
        if processes > sharing.processes and divided.total <= room:
            needs = f"{processes} processes (fsdp2)" + (f" and {words}" if words else "")
            return Fitted(candidate, "fits with more", needs, divided, shape, _settings(shape, words))
    return Fitted(candidate, "does not fit", "", least, shape, {})


def _shapes(candidate: Candidate, situation: Situation) -> Iterator[tuple[Shape, str]]:
    """Batches to try, each with the settings in words; the first needs no setting."""
    data, on_cpu, once = situation.data, situation.device.is_cpu, candidate.description.body_once
    share = max(1, GLOBAL_BATCH // situation.sharing.processes)
    micro = modest_micro_batch(share, data.cut_lengths)
    yield shape_of(data, (micro, share, modest_eval_batch(micro, data.longest)), once, on_cpu, situation.compute), ""
    small = shape_of(data, (1, share, 1), once, on_cpu, situation.compute)
    if micro > 1:
        yield small, "micro-batches of 1"
    if once:
        return
    yield replace(small, recompute=True), "activation checkpointing"
    if situation.quantizes and candidate.description.rank:
        yield replace(small, recompute=True, frozen=NF4_BYTES), "activation checkpointing and a 4-bit base (nf4)"


def shape_of(data: Survey, sizes: tuple[int, int, int], once: bool, on_cpu: bool, compute: int) -> Shape:
    """The batches of a run of one process.

    Args:
        sizes: sequences per pass, per optimizer step, and per evaluation pass.
        once: whether the body runs once over all examples.
        compute: bytes per number in the forward pass.
    """
    micro, share, eval_rows = sizes
    return Shape(
        data.longest,
        micro,
        max(1, share // micro),
        eval_rows=eval_rows,
        compute=compute,
        on_cpu=on_cpu,
        supervised=data.supervised_share,
        rows=data.rows,
        classifies=bool(data.outputs),
        widths=memory.batch_widths(data.pieces, micro, share, eval_rows, once),
    )


def _settings(shape: Shape, words: str) -> dict[str, object]:
    """Keys of `training:` for a run with these batches."""
    if not words:
        return {}
    sizes: dict[str, object] = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    return sizes | ({"activation_checkpointing": True} if shape.recompute else {})


def estimate(fitted: Fitted, situation: Situation) -> Timed:
    """Step 3: the time of a run, and how many epochs the time limit allows."""
    candidate, data, limit = fitted.candidate, situation.data, situation.time
    work, rate = work_of(candidate, data, fitted.shape.recompute, candidate.epochs), rate_for(candidate, situation)
    per_second = rate.value * situation.sharing.processes

    def takes(epochs: float) -> float:
        return speed.seconds(work, data.tokens, epochs, situation.eval_tokens, EVALUATIONS, per_second)

    timed = Timed(fitted, work, takes(candidate.epochs), candidate.epochs, band=rate.band)
    if limit is None:
        return timed
    if work.training:
        left = max(0.0, limit - speed.START_SECONDS)
        timed = replace(timed, steps=left * per_second / (work.training * data.mean_length * GLOBAL_BATCH))
    if timed.seconds <= limit:
        return timed
    per_epoch = work.training * data.tokens / per_second
    possible = (limit - takes(0.0)) / per_epoch if per_epoch else 0.0
    steps_per_epoch = data.rows / GLOBAL_BATCH
    least = min(LEAST_STEPS[candidate.strategy.needs_weights], steps_per_epoch)
    if possible * steps_per_epoch >= least:
        return replace(timed, seconds=limit, epochs=possible, words=f"{possible:.2g} of {candidate.epochs:g} epochs")
    late = takes(least / steps_per_epoch) / limit
    return replace(timed, in_time=False, late=late, words="exceeds the time")


def work_of(candidate: Candidate, data: Survey, recompute: bool, epochs: float) -> Work:
    """Operations per token; a solved head takes no steps and is evaluated on cached features."""
    work = speed.work(candidate.model, candidate.description, data.mean_length, data.supervised_share, recompute, epochs)
    return work._replace(training=0.0, evaluation=0.0) if candidate.description.body_once and data.outputs else work


def rate_for(candidate: Candidate, situation: Situation) -> Rate:
    """The rate measured with this strategy, with another one, or that of the machine."""
    rates = situation.measured.rates if situation.measured else {}
    if candidate.name in rates:
        return Rate(rates[candidate.name], "steps of this strategy measured here", time_band("measured"))
    if rates:
        middle = sorted(rates.values())[len(rates) // 2]
        return Rate(middle, "steps of other strategies measured here", time_band("others"))
    return situation.rate.for_width(candidate.model.width)


def smaller_if_needed(timed: Timed, situation: Situation) -> Timed:
    """A model from scratch that does not fit is halved until it does, or is as small as allowed."""
    most = math.inf
    while not timed.candidate.strategy.needs_weights and most > candidates.SMALLEST:
        if timed.fits and timed.steps >= rules.ENOUGH[True]:
            break
        most = max(candidates.SMALLEST, timed.candidate.model.parameters / 2)
        smaller = candidates.propose(timed.candidate.name, situation.model, situation.data, most)
        timed = estimate(fit(smaller, situation), situation)
    return timed


def score(timed: Sequence[Timed], situation: Situation) -> list[Scored]:
    """Step 4: apply the rules, which compare the strategies' training times and sizes."""
    seconds = {each.candidate.name: each.work.training for each in timed}
    sizes = {each.candidate.name: each.candidate.artifact_bytes for each in timed}
    return [Scored(each, rules.score(facts(situation, each, seconds, sizes), each.candidate.name)) for each in timed]


def facts(situation: Situation, timed: Timed, seconds: Mapping[str, float], sizes: dict[str, float]) -> Facts:
    """What the rules need to know about a candidate; by name, training times in any unit and bytes of the results."""
    data, measured, footprint = situation.data, situation.measured, timed.candidate.footprint
    floor = min((value for value in seconds.values() if value), default=1.0)
    return Facts(
        goal=situation.goal,
        rows=data.rows,
        classes=data.classes,
        tokens=data.tokens,
        scratch_parameters=situation.model.parameters,
        adapter_parameters=float(footprint.trainable),
        domain_gap=measured.domain_gap if measured else None,
        probe_gain=measured.probe_gain if measured else None,
        steps=timed.steps,
        late=timed.late,
        seconds={name: max(value, floor / 8) for name, value in seconds.items()},
        artifact_bytes=sizes,
    )


def rank(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """Step 5: best first: those that fit here, then those that need more processes, then the others; each by points.

    A run that ends after the time limit loses points by how late it is, but may still be before one that takes a few steps.
    """
    return tuple(sorted(scored, key=lambda each: (ORDER[each.fitted.kind], -each.score.points)))


def caveats(situation: Situation) -> list[str]:
    """The respects in which the predictions go beyond what was validated."""
    found, model = [], situation.model
    if not situation.device.is_cpu:
        found.append("memory on a GPU is predicted with the same terms, but its constants are not validated")
    elif model.family not in VALIDATED:
        found.append(f"memory was validated on {' and '.join(VALIDATED)} models, not on {model.family or 'this family'}")
    if situation.sharing.processes > 1:
        found.append(f"memory under {situation.sharing.kind} follows its documentation and is not validated")
    if situation.sharing.processes > 1 and situation.device.is_cpu:
        found.append("processes on a CPU share its memory and its cores, so more of them are not faster")
    if model.parameters > 500e6 and situation.device.is_cpu:
        found.append("memory was validated on models of up to 135M parameters")
    if situation.data.targets:
        found.append("the rules were measured on classifications and language models, not on regressions")
    if situation.measured is None:
        found.append("nothing was measured on this data, so the ranking follows rules alone")
    return found
