"""The advice in the terminal, and as JSON."""

from __future__ import annotations

import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfstrat.advisor import memory
from hfstrat.advisor.fitting import imports
from hfstrat.advisor.verdict import Advice, Situation, caveats
from hfstrat.strategies import defaults

WIDTH = 160
NARROWEST = 18  # characters of a column that holds a sentence
DOUBTFUL = 0.5  # an error from which on it is said in words
POINTS = (
    "points rank, and predict no score: by the rules, one is about a point of accuracy (of 100), or a hundredth of the loss"
)
KINDS = {"fits": "fits", "fits with": "fits with", "fits with more": "fits only with", "does not fit": "does not fit"}


def size(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount < 100 * 2**30 else f"{amount / 2**30:,.0f} GiB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    unit = next((unit for unit in (("B", 1e9), ("M", 1e6), ("k", 1e3)) if number >= unit[1]), ("", 1.0))
    return f"{number / unit[1]:.3g}{unit[0]}"


def show(situation: Situation, advices: list[Advice]) -> None:
    """Facts, the table of factors, the reasons."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    able = [advice for advice in advices if advice.can]
    wide = (console.width - 20) / len(able) >= NARROWEST

    def say(line: str, indent: int = 10) -> None:
        wrap = textwrap.TextWrapper(console.width, subsequent_indent=" " * indent, break_on_hyphens=False)
        for part in wrap.wrap(line):
            console.print(part, markup=False, soft_wrap=True)

    for line in header(situation):
        say(line)
    console.print(table(situation, able, wide))
    for advice in advices:
        say(reason(advice), 12)
        if not wide and advice.can:
            say(f"{'':<11} {about(advice)}", 12)
    for line in [*lack(situation, able), POINTS, *caveats(situation)]:
        say(f"note      {line}")


def header(situation: Situation) -> list[str]:
    device, time = situation.device, situation.time
    limits = f"{size(situation.limit)} of memory" + (f", {duration(time)}" if time else "") + f", goal {situation.goal}"
    shared = f", {situation.sharing.processes} processes ({situation.sharing.kind})" if situation.sharing.processes > 1 else ""
    found = [f"model     {situation.model.line()}"]
    found += [f"{'data' if not number else '':<9} {line}" for number, line in enumerate(situation.data.lines())]
    found.append(f"machine   {device.name}{shared}: {limits}")
    rate = situation.rate
    band = f", within {rate.band:.0%}" if rate.band else "; times from it were not checked"
    if rate.band and rate.band >= DOUBTFUL:
        band = f"; a rough one: times from it were off by a factor of up to {1 + rate.band:.2g} where they were checked"
    found.append(f"rate      {rate.value / 1e9:,.0f} Gflop/s, from {rate.source}{band}")
    checked = memory.memory_band()
    said = f"was {checked.words()}" if checked is not None and device.is_cpu else "was not checked on such a device"
    above = f" ({size(imports(True))})" if device.is_cpu else ""
    found.append(f"memory    the peak of one process; what is predicted above its imports{above} {said}")
    return found + [f"measured  {line}" for line in situation.measured.get("lines", [])]


def table(situation: Situation, able: list[Advice], wide: bool = True) -> Table:
    """One column a strategy, laid out after the factors; their words stand below it where the columns are too narrow."""
    found = Table("", *(f"{advice.rank}. {advice.name}" for advice in able), show_lines=False, padding=(0, 1, 0, 0))
    for factor, cells in rows(situation, able):
        if wide or factor not in defaults.WORDS:
            found.add_row(factor, *(Text(cell, overflow="fold") for cell in cells))
    return found


def rows(situation: Situation, able: list[Advice]) -> list[tuple[str, list[str]]]:
    words = [defaults.of(advice.name) for advice in able]
    return [
        ("model used", [each.model for each in words]),
        ("data needed", [each.data for each in words]),
        ("data there", [there(situation, advice) for advice in able]),
        ("learns", [learns(advice) for advice in able]),
        ("memory", [fits(advice) for advice in able]),
        ("time", [times(advice) for advice in able]),
        ("flexibility", [each.flexibility for each in words]),
        ("expected quality", [f"{advice.score.points:.0f} points" if advice.score else "" for advice in able]),
        ("risks", [each.risks for each in words]),
    ]


def lack(situation: Situation, able: list[Advice]) -> list[str]:
    """What is missing where nothing fits, and what comes nearest."""
    if any(advice.fits for advice in able):
        return []
    fitting = [advice for advice in able if advice.fit and advice.fit.fits_here]
    if not fitting:
        least = min((advice for advice in able if advice.fit), key=lambda advice: advice.fit.peak)  # type: ignore[union-attr]
        peak = least.fit.peak if least.fit else 0.0
        return [f"nothing fits into {size(situation.limit)}: {least.name} needs least, {size(peak)} (--memory)"]
    first = min(fitting, key=lambda advice: advice.seconds)
    return [
        f"nothing is done in {duration(situation.time or 0.0)}: {first.name} is quickest, {duration(first.seconds)} (--time)"
    ]


def about(advice: Advice) -> str:
    """The words of the factors, where the table has no room for them."""
    return "; ".join(f"{name}: {text}" for name, text in zip(defaults.WORDS, defaults.of(advice.name), strict=True))


def there(situation: Situation, advice: Advice) -> str:
    data, model = situation.data, advice.candidate.model
    if advice.candidate.strategy is not None and not advice.candidate.strategy.needs_weights and model is not None:
        return f"{data.tokens / max(1, model.parameters):.2g} tokens a parameter and epoch"
    if data.labels:
        return f"{data.rows / len(data.labels):,.0f} rows a class"
    return f"{data.rows:,} rows, {count(data.tokens)} tokens"


def learns(advice: Advice) -> str:
    footprint = advice.candidate.footprint
    return f"{count(footprint.trainable)} of {count(footprint.total)}" if footprint else ""


def fits(advice: Advice) -> str:
    if advice.fit is None:
        return ""
    words = KINDS[advice.fit.kind] + (f" {advice.fit.words}" if advice.fit.words else "")
    return f"{size(advice.fit.peak)}: {words}"


def times(advice: Advice) -> str:
    return duration(advice.seconds) + (f": {advice.time_words}" if advice.time_words else f" for {advice.epochs:g} epochs")


def reason(advice: Advice) -> str:
    """Why, in a sentence, and where that is from."""
    head = f"{f'{advice.rank}. {advice.name}':<11}"
    if not advice.can or advice.score is None:
        return f"{head} cannot be had: {advice.candidate.reason}"
    return f"{head} {'; '.join(f'{words} [{source}]' for words, source in advice.score.reasons())}"


def as_json(situation: Situation, advices: list[Advice]) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    band = memory.memory_band()
    model, data = situation.model, situation.data
    return {
        "model": {"name": model.name, "family": model.family, "parameters": model.parameters, "by_hand": model.by_hand},
        "data": {
            "source": data.source,
            "task": data.task,
            "rows": data.rows,
            "tokens": data.tokens,
            "supervised_share": data.supervised_share,
            "max_length": data.max_length,
            "cut_share": data.cut_share,
            "duplicates": data.duplicates,
            "labels": data.labels,
            "estimated": data.estimated,
        },
        "device": {"name": situation.device.name, "memory": situation.limit, "processes": situation.sharing.processes},
        "goal": situation.goal,
        "time": situation.time,
        "rate": situation.rate._asdict(),
        "measured": situation.measured,
        "memory_band": band._asdict() if band else None,
        "strategies": [_strategy(advice) for advice in advices],
        "caveats": caveats(situation),
    }


def _strategy(advice: Advice) -> dict[str, Any]:
    found: dict[str, Any] = {"rank": advice.rank, "name": advice.name, "strategy": advice.candidate.section}
    if not advice.can or advice.fit is None or advice.score is None or advice.candidate.footprint is None:
        return found | {"can": False, "reason": advice.candidate.reason}
    prediction = advice.fit.prediction
    return found | {
        "can": True,
        "fits": advice.fits,
        "memory": {
            "kind": advice.fit.kind,
            "with": advice.fit.words,
            "process_peak": advice.fit.peak,
            "peak": prediction.total,
            "phase": prediction.phase,
            "terms": prediction.terms,
            "phases": {name: sum(terms.values()) for name, terms in prediction.phases.items()},
            "micro_batch": advice.fit.shape.micro,
        },
        "time": {"seconds": advice.seconds, "epochs": advice.epochs, "in_time": advice.in_time, "band": advice.band},
        "footprint": advice.candidate.footprint._asdict(),
        "points": advice.score.points,
        "rules": [
            {"name": rule.name, "points": points, "says": rule.says, "source": rule.source}
            for rule, points in advice.score.parts
        ],
        "factors": defaults.of(advice.name)._asdict(),
    }
