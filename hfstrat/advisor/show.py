"""Advice on the terminal and as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from hfstrat.advisor import expected
from hfstrat.advisor.architecture import VALIDATED
from hfstrat.advisor.decide import Advice, Kind, Scored, Situation
from hfstrat.advisor.hardware import import_bytes, memory_band
from hfstrat.recipe import format, screen
from hfstrat.strategies import defaults

WIDTH = 160  # of output that is not a terminal
NARROWEST = 18  # characters of a column that holds a sentence
ROUGH = 0.5  # a relative error from which on it is reported as a factor
INTERVALS = "an interval holds the result in 80% of cases"
KINDS: dict[Kind, str] = {"fits with more": "fits only with"}  # in words where they differ
DATA = (
    "source",
    "task",
    "rows",
    "tokens",
    "supervised_share",
    "max_length",
    "cut_share",
    "duplicates",
    "remarks",
    "labels",
    "targets",
    "estimated",
    "sections",
    "reading",
)


def show(situation: Situation, advice: Advice) -> None:
    """Print the facts, the table of factors, what is expected and assumed, and the caveats."""
    console = screen.console(soft_wrap=False)
    if not console.is_terminal:
        console = screen.console(width=WIDTH)
    wide = (console.width - 20) / len(advice.ranked) >= NARROWEST

    def write(line: str, indent: int = 10) -> None:
        wrap = textwrap.TextWrapper(console.width, subsequent_indent=" " * indent, break_on_hyphens=False)
        for part in wrap.wrap(line):
            console.print(part, markup=False, soft_wrap=True)

    for line in header(situation):
        write(line)
    console.print(table(situation, advice, wide))
    for place, scored in enumerate(advice.ranked, 1):
        write(f"{f'{place}. {scored.name}':<11} {basis(scored)}", 12)
        if not wide:
            write(f"{'':<11} {factors_line(scored.name)}", 12)
    for name, why in advice.unavailable.items():
        write(f"{name:<11} not available: {why}", 12)
    for line in [*ties(advice), *shortfall(situation, advice), *caveats(situation)]:
        write(f"note      {line}")


def header(situation: Situation) -> list[str]:
    """What the advice is based on: model, data, machine, and how reliable the predictions are."""
    device, time, rate, sharing = situation.device, situation.time, situation.rate, situation.sharing
    limits = f"memory limit {format.memory(situation.limit)}" + (f", time limit {format.duration(time)}" if time else "")
    shared = f", {sharing.processes} processes ({sharing.kind})" if sharing.processes > 1 else ""
    lines = [f"model     {situation.model.line()}"]
    lines += [f"{'data' if not number else '':<9} {line}" for number, line in enumerate(situation.data.lines())]
    lines.append(f"machine   {device.name}{shared}: {limits}, goal {situation.goal}")
    band = f"times were within {rate.band:.0%} in validation" if rate.band else "times from this source are not validated"
    if rate.band and rate.band >= ROUGH:
        band = f"times are rough: off by a factor of up to {1 + rate.band:.2g} in validation"
    lines.append(f"speed     {rate.value / 1e9:,.0f} GFLOP/s, from {rate.source}; {band}")
    words = situation.data.files is None
    checked, imports = memory_band(words, situation.data.pictures is not None), format.memory(import_bytes(True, words))
    validation = "predictions are not validated on this device"
    if checked is not None and device.is_cpu:
        validation = f"predictions (without the {imports} of the imported libraries) were {checked.words()}"
    lines.append(f"memory    peak of one process; {validation}")
    return lines + [f"measured  {line}" for line in (situation.measured.lines if situation.measured else [])]


def table(situation: Situation, advice: Advice, wide: bool = True) -> Table:
    """One column per strategy and one row per factor; in narrow terminals, sentences are left to the lines below."""
    found = Table("", *(f"{place}. {scored.name}" for place, scored in enumerate(advice.ranked, 1)), padding=(0, 1, 0, 0))
    for factor, cells in rows(situation, advice):
        if wide or factor not in defaults.FACTOR_NAMES:
            found.add_row(*(Text(cell, overflow="fold") for cell in (factor, *cells)))
    return found


def rows(situation: Situation, advice: Advice) -> list[tuple[str, list[str]]]:
    ranked = advice.ranked
    words = [defaults.factors(scored.name) for scored in ranked]
    return [
        ("model used", [each.model for each in words]),
        ("data needed", [each.data for each in words]),
        ("data given", [data_given(situation, scored) for scored in ranked]),
        ("trainable", [trainable(scored) for scored in ranked]),
        ("peak memory", [peak_memory(scored) for scored in ranked]),
        ("time", [training_time(scored) for scored in ranked]),
        ("flexibility", [each.flexibility for each in words]),
        ("expected", [expected_quality(scored) for scored in ranked]),
        ("best with", [best_with(scored) for scored in ranked]),
        ("risks", [each.risks for each in words]),
    ]


def shortfall(situation: Situation, advice: Advice) -> list[str]:
    """What is missing if nothing fits, and the strategy that comes closest."""
    if any(scored.timed.fits for scored in advice.ranked):
        return []
    fitting = [scored for scored in advice.ranked if scored.fitted.fits_here]
    if not fitting:
        least = min(advice.ranked, key=lambda scored: scored.fitted.peak)
        needs = f"{least.name} needs least, {format.memory(least.fitted.peak)}"
        return [f"no strategy fits into {format.memory(situation.limit)}: {needs} (--memory)"]
    first = min(fitting, key=lambda scored: scored.timed.seconds)
    needs = f"{first.name} is fastest, {format.duration(first.timed.seconds)}"
    return [f"no strategy finishes within {format.duration(situation.time)}: {needs} (--time)"]


def factors_line(name: str) -> str:
    """The factors of a strategy in one line, for terminals whose columns are too narrow."""
    return "; ".join(f"{factor}: {text}" for factor, text in zip(defaults.FACTOR_NAMES, defaults.factors(name), strict=True))


def data_given(situation: Situation, scored: Scored) -> str:
    data, candidate = situation.data, scored.candidate
    if not candidate.strategy.needs_weights and data.files is None:
        return f"{data.tokens / max(1, candidate.model.parameters):.2g} tokens per parameter and epoch"
    if data.labels:
        return f"{data.rows / len(data.labels):,.0f} examples per class"
    return f"{data.rows:,} examples, {format.count(data.tokens)} tokens"


def trainable(scored: Scored) -> str:
    footprint = scored.candidate.footprint
    share = footprint.trainable / max(1, footprint.total)
    return f"{format.count(footprint.trainable)} of {format.count(footprint.total)} ({format.percent(share)})"


def peak_memory(scored: Scored) -> str:
    words = KINDS.get(scored.fitted.kind, scored.fitted.kind) + (f" {scored.fitted.words}" if scored.fitted.words else "")
    return f"{format.memory(scored.fitted.peak)}: {words}"


def training_time(scored: Scored) -> str:
    timed = scored.timed
    return f"{format.duration(timed.seconds)}: {timed.words or f'{timed.epochs:g} epochs'}"


def expected_quality(scored: Scored) -> str:
    """The expected value of the metric, with its 80 % interval."""
    return scored.expected.words() if scored.expected.value is not None else "unknown"


def best_with(scored: Scored) -> str:
    """The probability of being the best, or within noise of it."""
    return "unknown" if scored.expected.best is None else f"probability {scored.expected.best:.0%}"


def basis(scored: Scored) -> str:
    """What the expected quality rests on, and what is assumed."""
    one = scored.expected
    if one.value is None:
        return f"no quality is predicted: {one.basis}"
    return f"{one.words()}, from {one.basis}" + (f"; assumed: {', '.join(one.assumed)}" if one.assumed else "")


def ties(advice: Advice) -> list[str]:
    """Which strategies are not told apart from the first one, and how the intervals are meant."""
    first, *others = advice.ranked
    if first.expected.value is None:
        return ["no quality is predicted, so the order is that of memory and time, with random weights last"]
    unknown = [each.name for each in others if each.expected.value is None]
    if others and len(unknown) == len(others):
        return [
            f"{first.name} is first because its quality is known; that of {', '.join(unknown)} is not, and may be higher: "
            "measure them (hfstrat compare)",
            INTERVALS,
        ]
    alike = [each.name for each in others if expected.tied(first.expected, each.expected)]
    words = f"{INTERVALS}; best: within a point of accuracy, or 2% of the loss, of the best"
    return ([f"{first.name} and {', '.join(alike)} are not told apart: measure them (hfstrat compare)"] if alike else []) + [
        words
    ]


def caveats(situation: Situation) -> list[str]:
    """The respects in which the predictions go beyond what was validated."""
    found, model = [], situation.model
    if not situation.device.is_cpu:
        found.append("memory on a GPU is predicted with the same terms, but its constants are not validated")
    if model.reads_files:
        found.append(
            f"times were validated on models of text, not on {model.family}, whose layers before the blocks are counted by "
            "their shapes"
        )
    elif model.tower is not None:
        found.append(f"times were validated on models of text, not with images as those of {model.family}")
    elif situation.device.is_cpu and model.family not in VALIDATED:
        found.append(f"memory was validated on {' and '.join(VALIDATED)} models, not on {model.family or 'this family'}")
    if situation.sharing.processes > 1:
        found.append(f"memory under {situation.sharing.kind} follows its documentation and is not validated")
    if situation.sharing.processes > 1 and situation.device.is_cpu:
        found.append("processes on a CPU share its memory and its cores, so more of them are not faster")
    if model.parameters > 500e6 and situation.device.is_cpu:
        found.append("memory was validated on models of up to 135M parameters")
    if situation.measured is None and situation.data.files is None and situation.data.pictures is None:
        found.append("nothing was measured on this machine: quality is predicted from runs on other data sets")
    return found


def as_json(situation: Situation, advice: Advice) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    model, data, measured = situation.model, situation.data, situation.measured
    band = memory_band(data.files is None, data.pictures is not None)
    return {
        "model": {"name": model.name, "family": model.family, "parameters": model.parameters, "by_hand": model.by_hand},
        "data": {name: getattr(data, name) for name in DATA},
        "device": {"name": situation.device.name, "memory": situation.limit, "processes": situation.sharing.processes},
        "goal": situation.goal,
        "time": situation.time,
        "rate": situation.rate._asdict(),
        "measured": {key: value for key, value in asdict(measured).items() if value is not None} if measured else {},
        "memory_band": band._asdict() if band else None,
        "strategies": [
            *(_ranked(place, scored) for place, scored in enumerate(advice.ranked, 1)),
            *(
                {"rank": place, "name": name, "can": False, "reason": why}
                for place, (name, why) in enumerate(advice.unavailable.items(), len(advice.ranked) + 1)
            ),
        ],
        "caveats": caveats(situation),
    }


def _ranked(place: int, scored: Scored) -> dict[str, Any]:
    fitted, timed, prediction = scored.fitted, scored.timed, scored.fitted.prediction
    return {
        "rank": place,
        "name": scored.name,
        "strategy": scored.candidate.section,
        "can": True,
        "fits": timed.fits,
        "memory": {
            "kind": fitted.kind,
            "with": fitted.words,
            "process_peak": fitted.peak,
            "peak": prediction.total,
            "phase": prediction.phase,
            "terms": prediction.terms,
            "phases": {name: sum(terms.values()) for name, terms in prediction.phases.items()},
            "micro_batch": fitted.shape.micro,
        },
        "time": {"seconds": timed.seconds, "epochs": timed.epochs, "in_time": timed.in_time, "band": timed.band},
        "footprint": scored.candidate.footprint._asdict(),
        "expected": asdict(scored.expected),
        "factors": defaults.factors(scored.name)._asdict(),
    }
