"""The sections of a run's page about its data and its answers."""

from __future__ import annotations

from collections.abc import Sequence

from hfstrat.data.stats import Statistics as DataLines
from hfstrat.errors import UserError
from hfstrat.objectives import task_of
from hfstrat.pages import charts
from hfstrat.pages.blocks import (
    Block,
    Card,
    Cards,
    Charts,
    Fact,
    Facts,
    Figure,
    Part,
    Picture,
    Piece,
    Prose,
    Row,
    Section,
    Table,
)
from hfstrat.recipe import format
from hfstrat.tasks.base import Pictures
from hfstrat.tasks.report import Result, Run
from hfstrat.tasks.report_parts import DataStatistics, Lengths, Shown, Statistics

ABOUT_MASKS = "Marked text is supervised: only its tokens contribute to the loss. The rest is context."
ABOUT_TARGETS = "The text as the model is given it, with special tokens, and what it is trained to predict."
ABOUT_FILES = "The files of the examples, and what the model is trained to predict."
ABOUT_SHEET = (
    "Training images: on the left as they are in the data, then as the model is given them (in several epochs where they vary)."
)


def answers(result: Result, pictures: Pictures) -> list[Section]:
    """The answers to prompts before and after training, side by side."""
    cards = []
    for number, answer in enumerate(result.answers):
        beside = [("before training", answer.before), ("after training", answer.after), ("reference", answer.reference)]
        parts = [Part(heading, text.strip() or "(nothing)") for heading, text in beside if text or heading == "after training"]
        source = pictures.of_answer(number)
        picture = Picture(source, f"evaluation image {number + 1}: {answer.prompt}") if source else None
        cards.append(Card(f"Example {number + 1}", [Part("prompt", answer.prompt.strip())], parts, picture))
    return [Section("Before and after", [Cards(cards)])] if cards else []


def sections(run: Run, pictures: Pictures) -> list[Section]:
    """The first examples with their masks, and the statistics of the data."""
    found = []
    reads_text = task_of(run.recipe).model.reads_tokens
    if blocks := _examples(run.data.shown if run.data else [], pictures, reads_text):
        found.append(Section("Examples as the model sees them", blocks))
    if run.data:
        found.append(Section("Data", _statistics(run.data)))
    return found


def _examples(shown: Sequence[Shown], pictures: Pictures, reads_text: bool) -> list[Block]:
    if pictures.sheet:
        return [Figure(Picture(pictures.sheet, f"training images with their labels: {_labels(shown)}"), ABOUT_SHEET)]
    if not shown:
        return []
    has_masks = any(each.supervised is not None for each in shown)
    targets = ABOUT_TARGETS if reads_text else ABOUT_FILES
    about = ABOUT_MASKS if has_masks else targets if any(each.target for each in shown) else ""
    return [
        *([Prose([about], "faint")] if about else []),
        Cards([_card(each, pictures.of_example(at)) for at, each in enumerate(shown)], "full" if has_masks else "small"),
    ]


def _labels(shown: Sequence[Shown]) -> str:
    return ", ".join(each.target.removeprefix("label ") for each in shown) or "unknown"


def _card(shown: Shown, source: str = "") -> Card:
    sizes = [format.plural(shown.tokens, "token")] if shown.tokens is not None else []
    sizes += [f"{shown.supervised:,} supervised"] if shown.supervised is not None else []
    pieces = [Piece(span.text, span.supervised, span.omitted) for span in shown.text]
    notes = [Part("trained to predict", shown.target)] if shown.target else []
    notes += [Part("note", shown.note)] if shown.note else []
    picture = Picture(source, f"the images of {shown.title[:1].lower()}{shown.title[1:]}") if source else None
    return Card(shown.title, [Part(", ".join(sizes) or "input", pieces=pieces), *notes], picture=picture)


def _statistics(data: DataStatistics) -> list[Block]:
    parts = [("training", data.train), *([("evaluation", data.eval)] if data.eval else [])]
    rows = [_row(role, each, indented=each is not part) for role, part in parts for each in (part, *part.sources)]
    head = ["source", "used for", "format", "examples", "of rows", "tokens", "supervised", "left out"]
    blocks: list[Block] = [Table("Sources of the data", head, rows)]
    if not data.eval:
        blocks.append(Prose(["Evaluation examples are held out from the training data."], "faint"))
    blocks.append(Prose([f"{line[:1].upper()}{line[1:]}." for _, part in parts for line in _remarks(part)]))
    if found := data.overlap:
        counts = [
            ("Duplicates in training", found.train_duplicates),
            ("Evaluation examples in training", found.eval_rows_in_train),
        ]
        blocks.append(Facts([Fact(name, f"{count:,}") for name, count in counts]))
    if data.labels and data.labels.training_rows:
        total = sum(data.labels.training_rows.values()) or 1
        ranked = sorted(data.labels.training_rows.items(), key=lambda each: -each[1])
        lines = [Row([label, f"{count:,}", format.percent(count / total)]) for label, count in ranked]
        blocks.append(Table("Labels of the training examples, the most frequent first", ["label", "examples", "share"], lines))
    if data.labels and data.labels.targets:
        lines = [Row([name, *(f"{value:.4g}" for value in each.values())]) for name, each in data.labels.targets.items()]
        names = next(iter(data.labels.targets.values()))
        blocks.append(Table("Numbers to predict, in the training examples", ["target", *names], lines))
    return [*blocks, *_lengths(data.lengths or {})]


def _row(role: str, part: Statistics, indented: bool) -> Row:
    tokens, supervised = (format.count(count) if count else format.MISSING for count in (part.tokens, part.supervised))
    lost = format.plural(part.tokens_lost, "token") if part.tokens_lost else format.MISSING
    template = f", {part.template} template" if part.template and part.format != "text" else ""
    cells = [f"{part.rows_kept:,}", f"{part.rows_read:,}", tokens, supervised, lost]
    return Row([part.source or "the data", role, f"{part.format}{template}", *cells], indented=indented)


def _remarks(part: Statistics) -> list[str]:
    """What is unusual about the data, in words; nothing of a report that another version wrote in another form."""
    try:
        return DataLines.from_dict(part.model_dump()).remarks()
    except (UserError, ValueError, TypeError, AttributeError):
        return []


def _lengths(found: dict[str, Lengths]) -> list[Block]:
    if not found:
        return []
    rows = [
        Row(
            [
                f"{name}ing" if name == "train" else "evaluation",
                *(f"{value:,.0f}" for value in (each.least, each.median, each.p95, each.most)),
            ]
        )
        for name, each in found.items()
    ]
    head = ["examples", "shortest", "median", "95% up to", "longest"]
    blocks: list[Block] = [Table("Lengths in tokens", head, rows)]
    if train := found.get("train"):
        ends = float(train.least), float(max(train.most, train.least + 1))
        title = "Lengths of the training examples"
        drawn = charts.histogram(title, ("tokens", "examples"), ends, train.counts, format.count)
        blocks += [Charts([drawn])] if drawn else []
    return blocks
