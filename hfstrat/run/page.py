"""report.html of a run: the verdict first, then what it rests on. Made from report.json and pictures.json alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat import __version__, strategies
from hfstrat.errors import first_line
from hfstrat.objectives import task_of
from hfstrat.pages.blocks import Bullets, Fact, Facts, Page, Section, cut
from hfstrat.pages.render import render
from hfstrat.publish.scrub import Scrubber
from hfstrat.recipe import format
from hfstrat.run import advice, examples, page_data, page_training, verdict
from hfstrat.tasks import report as reports
from hfstrat.tasks.base import Pictures
from hfstrat.tasks.report import Report, Result

FILE = "report.html"


def write(report: Report, folder: Path) -> Path:
    """Write report.html beside report.json in one move; returns its path."""
    return write_page(page_of(report, examples.kept_pictures(folder)), folder / FILE)


def write_page(page: Page, file: Path) -> Path:
    """Write a page in one move, so that the file is always complete; returns its path."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(render(page), encoding="utf-8")
    return partial.replace(file)


def write_safely(report: Report, folder: Path, say: Callable[[str], None]) -> Path | None:
    """As `write`; a mistake of this code or a full disk is a warning, since the run is complete without a page."""
    try:
        return write(report, folder)
    except Exception as error:
        say(f"{'warning':<16} no {FILE}: {type(error).__name__}: {first_line(error)}")
        return None


def sections_of(folder: Path) -> list[Section]:
    """The sections of the run in a folder; none where it has no readable report."""
    report = reports.read(folder)
    return [] if report is None else list(page_of(report, examples.kept_pictures(folder)).sections)


def page_of(report: Report, pictures: Pictures) -> Page:
    """The page of a run, finished or not."""
    public = without_paths(report)
    run, result = public.run, public.result
    model = run.recipe.model.name_or_path or "random weights"
    data = ", ".join(dict.fromkeys(Path(source.path).name for source in run.recipe.data.train))
    objective = "" if run.recipe.objective.name == "sft" else f" with {run.recipe.objective.name}"
    about = f"{run.strategy}{objective} on {model}, trained on {data}."
    parts = [Section("Result", [verdict.verdict(public), *([tiles(public, result)] if isinstance(result, Result) else [])])]
    if isinstance(result, Result):
        parts += finished(public, result, pictures)
    else:
        parts += page_training.curves(public, result.curve or [], result.losses or [], [])
        parts += page_data.sections(run, pictures)
    parts.append(page_training.settings(run))
    title = f"{Path(run.recipe.output_dir).name}: {run.recipe.task}"
    return Page(title, parts, about, f"Written by hfstrat {__version__} from report.json, which has all numbers in full.")


def finished(report: Report, result: Result, pictures: Pictures) -> list[Section]:
    """The sections of a finished run after the verdict."""
    task, strategy = task_of(report.run.recipe), strategies.build(report.run.recipe.strategy)
    return [
        *page_training.curves(report, result.curve, result.losses, result.speeds),
        *page_data.answers(result, pictures),
        *task.text.sections(result, pictures),
        *strategy.sections(result),
        *page_training.metrics(report, result),
        *page_training.baselines(result),
        *page_data.sections(report.run, pictures),
        *page_training.predicted(result),
        Section("What to try next", [Bullets(advice.advice(report, result))]),
        page_training.course(report, result),
    ]


def tiles(report: Report, result: Result) -> Facts:
    """The most important numbers."""
    before, found = result.metrics_before or {}, []
    shown = [name for name in format.without_negative(result.metrics_after) if name not in ("rows", "tokens")]
    for name in shown[:6]:
        note = f"before {format.metric(name, before[name])}" if name in before else ""
        found.append(Fact(verdict.named(report, name), format.metric(name, result.metrics_after[name]), note))
    speed = format.rate(result.tokens_per_second) if result.tokens_per_second else ""
    trained = f"{format.count(result.trainable_parameters)} of {format.count(result.total_parameters)}"
    return Facts(
        [
            *found,
            Fact("Time", format.duration(result.total_seconds), f"{format.duration(result.train_seconds)} of training"),
            *([Fact("Throughput", speed)] if speed else []),
            Fact("Peak memory", format.memory(result.peak_memory_bytes)),
            Fact("Trained parameters", trained),
            *([Fact("Size of the result", format.file_size(result.artifact_bytes))] if result.artifact_bytes else []),
        ]
    )


QUOTES = {"answers", "mistakes"}  # parts of the result that quote the data


def without_paths(report: Report) -> Report:
    """The report without what is local to this machine, since a page is shared: paths keep their last part.

    Quotes of the data keep paths that are part of their text, but not this machine's folders.
    """
    recipe = report.run.recipe
    scrubber, stored = Scrubber(recipe.model_dump()), report.model_dump(mode="json")
    reads_text = task_of(recipe).model.reads_tokens
    quoted: dict[str, Any] = {name: stored["result"].pop(name, None) for name in QUOTES} if reads_text else {}
    shown = (stored["run"].get("data") or {}).pop("shown", None) if reads_text else None
    public: dict[str, Any] = scrubber.value(stored)
    for name, value in quoted.items():
        if value is not None:
            public["result"][name] = scrubber.quotes(shortened(value))
    if shown is not None:
        public["run"]["data"]["shown"] = scrubber.quotes(shortened(shown))
    return Report.model_validate(public)


def shortened(value: Any) -> Any:
    """A JSON value whose texts are cut as they are shown, so that what is not shown takes no time."""
    if isinstance(value, dict):
        return {name: shortened(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return cut(value) if isinstance(value, str) else value
