"""Advice in five steps: candidates -> fit into memory -> time -> expected quality -> rank.

Each step is a function of a `Situation` and of the frozen result of the step before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hfstrat.advisor import candidates, expected, hardware, memory, speed, towers
from hfstrat.advisor.architecture import Model
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.data import Survey
from hfstrat.advisor.expected import Expected, Known, Plan
from hfstrat.advisor.hardware import Device, Sharing, import_bytes, time_band
from hfstrat.advisor.measured_runs import Run, shipped
from hfstrat.advisor.memory import Prediction, Shape
from hfstrat.advisor.speed import Rate, Work
from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.trainer.plan import HEADROOM, modest_eval_batch, modest_micro_batch

GLOBAL_BATCH = 16
EVALUATIONS = 6.0  # one before training, four during, one after
MANY = 1e6  # epochs, of which all use what is cached
ENOUGH = 300.0  # steps from scratch, for which a smaller model is better than fewer steps (scratch_recipes.md)
LEAST_STEPS = {True: 1.0, False: 20.0}  # fewer are not worth a run: with pretrained weights, and from scratch
PROCESSES = (2, 4, 8, 16, 32, 64, 128)
NF4_BYTES = 0.57  # per weight: 4 bits and the scales of blocks of 64 (arXiv 2305.14314)
ALONE, NO_RATE = Sharing(), Rate(0.0, "")

Kind = Literal["fits", "fits with", "fits with more", "does not fit"]
ORDER: dict[Kind, int] = {"fits": 0, "fits with": 0, "fits with more": 1, "does not fit": 2}


@dataclass(frozen=True)
class Measured:
    """What `--measure` found: scores (None: not measured), lines of text, and by strategy the speed of steps.

    rates: operations per second, without the fixed cost of a step; `fixed`: that cost in seconds.
    """

    rates: dict[str, float]
    domain_gap: float | None = None
    probe_gain: float | None = None
    lines: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)

    @property
    def probe(self) -> float | None:
        """Accuracy of a probe on the base's features."""
        found = self.raw.get("probe") or {}
        return float(found["probe"]) if found.get("metric") == "accuracy" else None

    @property
    def curve(self) -> dict[int, float]:
        """Accuracy of the probe by the number of its examples."""
        found = self.raw.get("probe") or {}
        return {int(count): float(value) for count, value in found["curve"].items()} if self.probe is not None else {}

    @property
    def base_bits(self) -> float | None:
        """Bits per byte that the base needs on the texts."""
        found = (self.raw.get("bits_per_byte") or {}).get("data") or {}
        return float(found["needed"]) if found.get("needed") else None


@dataclass(frozen=True)
class Situation:
    """What advice is given for.

    limit: bytes of memory of one device.
    time: seconds; None: no limit.
    evaluations: of a run, of all held-out examples.
    by_clock: whether every run ends by the clock, as in a search, with at most as many epochs as are proposed.
    quantizes: whether frozen weights can be quantized here.
    runs: the measured runs to learn from.
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
    runs: tuple[Run, ...] = field(default_factory=shipped)
    evaluations: float = EVALUATIONS
    by_clock: bool = False

    @property
    def known(self) -> Known:
        """What is known of the data."""
        known, found = replace(expected.known_of(self.data), runs=self.runs), self.measured
        if found is None:
            return known
        return replace(known, probe=found.probe, gap=found.domain_gap, base_bits=found.base_bits, curve=found.curve)

    @property
    def compute(self) -> int:
        """Bytes per number in the forward pass."""
        return 2 if not self.device.is_cpu or hardware.has_bfloat16() else 4

    def given_to(self, candidate: Candidate) -> Situation:
        """The situation with the data as the model of this candidate is given them."""
        return self if candidate.data is None else replace(self, data=candidate.data)

    @property
    def has_measured_steps(self) -> bool:
        return bool(self.measured and self.measured.rates)

    @property
    def eval_rows(self) -> float:
        return min(1000.0, max(1.0, 0.05 * self.data.rows))

    @property
    def eval_tokens(self) -> float:
        return self.eval_rows * self.data.mean_length


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
        return self.prediction.total + import_bytes(self.shape.on_cpu, self.shape.reads_words)

    @property
    def fits_here(self) -> bool:
        return self.kind in ("fits", "fits with")


@dataclass(frozen=True)
class Timed:
    """A fitted candidate with its training time.

    epochs: as many as the time allows.
    late: the shortest run that is worth it, in multiples of the time limit, where it exceeds that.
    words: what the time limit changes; empty: nothing.
    band: relative error of such times; None: not validated.
    """

    fitted: Fitted
    work: Work
    seconds: float
    epochs: float
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
    """A timed candidate with its expected quality."""

    timed: Timed
    expected: Expected

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
    return Advice(rank(score(timed, situation), situation), unavailable)


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
    situation = situation.given_to(candidate)
    device, sharing = situation.device, situation.sharing
    room = HEADROOM * situation.limit - import_bytes(device.is_cpu, situation.data.files is None)
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
        reads_words=data.files is None,
        pixels=int(data.pictures.numbers.max()) if data.pictures is not None else 0,
        image_tokens=int(data.pictures.tokens.max()) if data.pictures is not None else 0,
    )


def _settings(shape: Shape, words: str) -> dict[str, object]:
    """Keys of `training:` for a run with these batches."""
    if not words:
        return {}
    sizes: dict[str, object] = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    return sizes | ({"activation_checkpointing": True} if shape.recompute else {})


def estimate(fitted: Fitted, situation: Situation) -> Timed:
    """Step 3: the time of a run, and how many epochs the time limit allows."""
    situation = situation.given_to(fitted.candidate)
    candidate, steps_per_epoch, limit = fitted.candidate, situation.data.rows / GLOBAL_BATCH, situation.time
    work, rate, takes = costs(fitted, situation, None if situation.by_clock else candidate.epochs)
    timed = Timed(fitted, work, takes(candidate.epochs), candidate.epochs, band=rate.band)
    if limit is None or timed.seconds <= limit:
        return timed
    if not situation.by_clock:
        return estimate(fitted, replace(situation, by_clock=True))
    per_epoch = takes(1.0) - takes(0.0)
    possible = (limit - takes(0.0)) / per_epoch if per_epoch else 0.0
    least = min(LEAST_STEPS[candidate.strategy.needs_weights], steps_per_epoch)
    if possible * steps_per_epoch >= least:
        return replace(timed, seconds=limit, epochs=possible, words=f"{possible:.2g} of {candidate.epochs:g} epochs")
    epochs = least / steps_per_epoch if work.training else candidate.epochs
    takes_least = takes(epochs)
    words = f"ends {format.duration(takes_least - limit)} late"
    return replace(timed, seconds=takes_least, epochs=epochs, in_time=False, late=takes_least / limit, words=words)


def costs(fitted: Fitted, situation: Situation, epochs: float | None) -> tuple[Work, Rate, Callable[[float], float]]:
    """Operations, their rate, and the seconds of a run by its number of epochs.

    Args:
        epochs: for which the run is planned; None: it ends by the clock.
    """
    work = work_of(fitted.candidate, situation.data, fitted.shape.recompute, epochs)
    data, rate = situation.data, rate_for(fitted, situation, work)
    rate = rate._replace(value=rate.value * situation.sharing.processes)

    def takes(epochs: float) -> float:
        count, steps = situation.evaluations, data.rows / GLOBAL_BATCH
        found = speed.seconds(work, data.tokens, steps, epochs, situation.eval_tokens, count, rate)
        return found + reading_seconds(work, data, situation.eval_rows, epochs, count, situation.has_measured_steps)

    return work, rate, takes


def reading_seconds(
    work: Work, data: Survey, rows: float, epochs: float, evaluations: float, has_measured_steps: bool = False
) -> float:
    """Seconds in which files are decoded: when the data are prepared, for what is computed once, and in steps and evaluations.

    Args:
        rows: of an evaluation.
        has_measured_steps: whether the rate of steps and evaluations was measured with decoding.
    """
    passes = (data.rows + rows) * (1 + (work.once > 0))
    if not has_measured_steps and not work.once:
        passes += data.rows * epochs * (work.training > 0) + rows * evaluations * (work.evaluation > 0)
    return data.reading * passes


def work_of(candidate: Candidate, data: Survey, recompute: bool, epochs: float | None) -> Work:
    """Operations per token; a solved head takes no steps and is evaluated on cached features.

    Args:
        epochs: None: the run ends by the clock, so that hidden states are not cached (`strategies.frozen.precompute`).
    """
    length, description = data.mean_length / data.sequences, candidate.description
    is_solved = description.body_once and data.outputs
    if epochs is None and getattr(candidate.strategy, "precompute", "auto") is True:
        epochs = MANY  # they are cached anyway
    elif epochs is None and not is_solved:
        description = description._replace(body_once=False, keeps_prefix=False)
    work = speed.work(candidate.model, description, length, data.supervised_share, recompute, epochs or 1.0)
    if data.pictures is not None:
        own = data.own_sections.get("image", {}).get("precompute", "auto")
        precompute = own if candidate.strategy.caches_tower else False
        work = towers.with_tower(work, candidate.model, description, data.pictures, length, epochs or 1.0, precompute)
    if data.generation is not None and data.generation.is_rewarded:
        read = work.evaluation if data.generation.has_reference else 0.0
        return work._replace(training=work.training + read, evaluation=0.0)  # no loss of given answers is computed
    if data.generation is not None:
        return work._replace(training=work.training + work.once, once=0.0)  # the teacher reads new answers in each step
    return work._replace(training=0.0, evaluation=0.0) if is_solved else work


def rate_for(fitted: Fitted, situation: Situation, work: Work) -> Rate:
    """The rate and the fixed cost measured with this strategy, with others (their medians), or those of the machine."""
    candidate, measured = fitted.candidate, situation.measured
    rates = measured.rates if measured else {}
    if measured and candidate.name in rates:
        fixed = measured.fixed.get(candidate.name, 0.0)
        return Rate(rates[candidate.name], "steps of this strategy measured here", time_band("measured"), fixed=fixed)
    if measured and rates:
        middle = sorted(rates.values())[len(rates) // 2]
        fixed = sorted(measured.fixed.get(name, 0.0) for name in rates)[len(rates) // 2]
        return Rate(middle, "steps of other strategies measured here", time_band("others"), fixed=fixed)
    passes = fitted.shape.passes * situation.sharing.processes  # which share the cores
    data = situation.given_to(candidate).data
    return speed.on_cpu(situation.rate, candidate.model, candidate.description, work, data.supervised_share, passes)


def smaller_if_needed(timed: Timed, situation: Situation) -> Timed:
    """A model from scratch that does not fit is halved until it does, or is as small as allowed."""
    most = math.inf
    while not timed.candidate.strategy.needs_weights and most > candidates.SMALLEST:
        if timed.fits and timed.epochs * situation.data.rows / GLOBAL_BATCH >= ENOUGH:
            break
        most = max(candidates.SMALLEST, timed.candidate.model.parameters / 2)
        smaller = candidates.propose(timed.candidate.name, situation.model, situation.data, most)
        timed = estimate(fit(smaller, situation), situation)
    return timed


def score(timed: Sequence[Timed], situation: Situation) -> list[Scored]:
    """Step 4: the quality that each is expected to have when its time is over."""
    plans = [plan_of(each, situation.data) for each in timed]
    found = expected.expect(plans, situation.known)
    return [Scored(each, one) for each, one in zip(timed, found, strict=True)]


def plan_of(timed: Timed, data: Survey, batch: int = GLOBAL_BATCH) -> Plan:
    """The run as predictions of quality see it; a solved head takes no steps."""
    candidate = timed.candidate
    steps = timed.epochs * data.rows / batch if timed.work.training else 0.0
    is_solved = candidate.description.body_once and not timed.work.training
    return Plan(
        candidate.name, float(candidate.model.parameters), not candidate.model.is_encoder, steps, steps * batch, is_solved
    )


def rank(scored: Sequence[Scored], situation: Situation) -> tuple[Scored, ...]:
    """Step 5: best first. Those that fit into the memory of this machine are before those that need more processes, and these
    before the others; in time (or a minute, or half of the time, late) before later.

    With another goal than quality, those within the interval of the best come first, the fastest or smallest one first.
    What has no known quality comes last: pretrained weights before random ones, then the fastest first.
    """
    tolerance = 0.0 if situation.time is None else max(60.0, 0.5 * situation.time)

    def place(each: Scored) -> tuple[int, bool]:
        is_late = situation.time is not None and not each.timed.in_time and each.timed.seconds > situation.time + tolerance
        return ORDER[each.fitted.kind], is_late

    def starts_empty(each: Scored) -> bool:
        return not each.candidate.strategy.needs_weights

    found = sorted(scored, key=lambda each: (*place(each), -each.expected.merit, starts_empty(each), each.timed.seconds))
    if situation.goal == "quality":
        return tuple(found)
    first = found[0]
    cost = {"speed": lambda each: each.timed.seconds, "size": lambda each: each.candidate.artifact_bytes}[situation.goal]
    near = [each for each in found if place(each) == place(first) and (each is first or each.expected.reaches(first.expected))]
    near = near if first.expected.value is not None else [each for each in found if place(each) == place(first)]
    return (*sorted(near, key=cost), *(each for each in found if each not in near))
