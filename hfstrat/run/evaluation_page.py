"""The page of `hfstrat evaluate`: made from its JSON file, beside which it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfstrat import __version__
from hfstrat.errors import first_line
from hfstrat.evaluation.evaluate import Request
from hfstrat.evaluation.intervals import ROWS
from hfstrat.objectives import task_of
from hfstrat.pages.blocks import BAD, GOOD, PLAIN, UNCLEAR, Card, Cards, Line, Page, Part, Prose, Section, Verdict
from hfstrat.publish.scrub import Scrubber
from hfstrat.recipe import format
from hfstrat.recipe.schema import Recipe
from hfstrat.run import page_training, verdict
from hfstrat.run.page import write_page
from hfstrat.tasks.base import Pictures
from hfstrat.tasks.report import Report, Result, Run
from hfstrat.tasks.report_parts import Details, Measured

NOTHING: dict[str, Any] = {  # that an evaluation trains
    **dict.fromkeys(("steps", "tokens", "peak_memory_bytes", "trainable_parameters", "total_parameters"), 0),
    **dict.fromkeys(("train_seconds", "tokens_per_second"), 0.0),
}


def write_safely(request: Request, say: Callable[[str], None]) -> Path | None:
    """Write the page beside the JSON file of an evaluation; a mistake of this code is only a warning."""
    if not request.output:
        return None
    file = Path(request.output)
    try:
        page = page_of(json.loads(file.read_text(encoding="utf-8")), request.recipe())
        return write_page(page, file.with_suffix(".html"))
    except Exception as error:
        say(f"warning: no page beside {file}: {type(error).__name__}: {first_line(error)}")
        return None


def page_of(found: dict[str, Any], recipe: Recipe) -> Page:
    """The page of what an evaluation has written.

    Args:
        found: the content of the JSON file.
        recipe: of the run that was measured, with the settings of the evaluation.
    """
    scrubber, rows_are_text = Scrubber(recipe.model_dump()), task_of(recipe).model.reads_tokens
    answers = found.get("answers", [])
    public: dict[str, Any] = scrubber.value({key: value for key, value in found.items() if key != "answers"})
    public["answers"] = scrubber.quotes(answers) if rows_are_text else scrubber.value(answers)
    measured = {name: Measured.model_validate(one) for name, one in public.get("measured", {}).items()}
    report = report_of(recipe, measured)
    names = (public.get("against") or "before", public.get("target") or "the model")
    tables = [page_training.measured(report, page_training.NAMES.get(key, key), one, names) for key, one in measured.items()]
    how = f"{page_training.ABOUT_INTERVALS}: {public['interval']}." if public.get("interval") else ""
    sections = [
        Section("Result", [headline(report, measured, names)]),
        Section("Metrics", [*tables, Prose([how] if how else [], "faint")]) if tables else None,
        *task_of(recipe).text.sections(report.finished, Pictures()),
        _answers(public["answers"], names),
        Section("Settings", [_settings(public)]),
    ]
    data = ", ".join(dict.fromkeys(Path(source.path).name for source in recipe.data.train if source.path != "-"))
    about = f"Measured{f' on {data}' if data else ''}{f', against {names[0]}' if public.get('against') else ''}."
    took = format.duration(found.get("seconds"))
    footer = f"Written by hfstrat {__version__} evaluate in {took}."
    return Page(f"{names[1]}: evaluation", [each for each in sections if each], about, footer)


def report_of(recipe: Recipe, measured: dict[str, Measured]) -> Report:
    """A report that has what an evaluation knows of a model."""
    own = measured.get(ROWS)
    values = {name: one.value for name, one in (own.after if own else {}).items() if one.value is not None}
    try:
        details = Details.model_validate(own.details) if own and own.details else None
    except ValidationError:  # of a task with other details
        details = None
    result = Result(**NOTHING, metrics_after=values, evaluation=details, measured=measured)
    return Report(run=Run(recipe=recipe), result=result)


def headline(report: Report, measured: dict[str, Measured], names: tuple[str, str]) -> Verdict:
    """The main metric of the examples, and the difference of the two models; else how much was measured."""
    own, metric = measured.get(ROWS), verdict.main_metric(report)
    if own is None or metric not in own.after:
        return Verdict(Line(f"{format.plural(len(measured), 'measurement')} of {names[1]}.", PLAIN))
    name, value = verdict.named(report, metric), own.after[metric]
    text = f"{name[:1].upper()}{name[1:]}: {format.metric(metric, value.value)}"
    change, other = (own.difference or {}).get(metric), (own.before or {}).get(metric)
    if change is None or change.value is None or other is None:
        return Verdict(Line(f"{text}{verdict.bounds(metric, value)} on {format.plural(own.rows, 'example')}.", PLAIN))
    text += f", {format.metric(metric, other.value)} of {names[0]}: a difference of {format.difference(metric, change.value)}"
    text += verdict.bounds(metric, change, is_difference=True)
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return Verdict(Line(f"{text}, {verdict.CHANCE}.", UNCLEAR))
    better = (change.value > 0) == verdict.higher_is_better(report, metric)
    return Verdict(Line(f"{text}.", GOOD if better else BAD))


def _answers(answers: list[dict[str, str]], names: tuple[str, str]) -> Section | None:
    """The answers of both models side by side."""
    cards = []
    for number, answer in enumerate(answers, 1):
        named = [(names[0], "before"), (names[1], "after"), ("reference", "reference")]
        beside = [Part(heading, answer[key].strip() or "(nothing)") for heading, key in named if key in answer]
        cards.append(Card(f"Example {number}", [Part("prompt", answer.get("prompt", "").strip())], beside))
    return Section("Answers", [Cards(cards)]) if cards else None


def _settings(public: dict[str, Any]) -> Prose:
    settings, machine = public.get("settings", {}), public.get("environment", {})
    device = ", ".join(machine.get("gpus") or []) or machine.get("processor") or "CPU"
    libraries = ", ".join(f"{name} {version}" for name, version in machine.get("libraries", {}).items())
    lines = [f"Seed {settings.get('seed')}, quantization {settings.get('quantization')}."]
    return Prose([*lines, f"{device}; Python {machine.get('python')}; {libraries}."], "faint")
