"""Statistics of the training data: examples, tokens, classes, lengths, duplicates. No torch, no transformers."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hfstrat.advisor.files import Files
from hfstrat.advisor.generation import Generation
from hfstrat.advisor.pictures import Pictures
from hfstrat.data import readers, sources
from hfstrat.data.columns import filled
from hfstrat.data.formats import Example
from hfstrat.data.labeled import check_blank
from hfstrat.data.labels import check_labels, similar_labels, sort_labels
from hfstrat.data.preferences import LabeledFormat, Preference, PreferenceFormat
from hfstrat.data.prompts import Prompt, PromptFormat
from hfstrat.data.stats import Statistics, check_rows
from hfstrat.data.values import BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.format import plural
from hfstrat.recipe.load import key_of
from hfstrat.recipe.schema import OBJECTIVES
from hfstrat.tasks import TASKS, CausalLM, task_of_rows

MOST_READ = 50_000  # rows; beyond them their number is estimated from the size of the file
SAMPLE = 2_000  # rows that are tokenized
BYTES_PER_TOKEN = 4.0  # of English, used without a tokenizer
TURN_TOKENS = 5  # that a chat template adds per message, roughly
BY_HAND = "by hand"  # instead of a source
NAMED = 20  # classes, up to which each is named with its examples
KEPT = 0.995  # share of the tokens within the proposed max_length


@dataclass
class Survey:
    """Statistics of a data set. The tokens of an image or a recording are the positions that a model has for it.

    lengths: tokens of the sampled examples, before truncation.
    texts: the sampled examples as plain text; `text_labels`: their labels, where each has one.
    labels: number of examples per label of a classification.
    many: whether an example may have several labels.
    targets: mean and standard deviation of each number of a regression.
    estimated: what is not exact, in words.
    remarks: what is not read, and what may be wrong with the rows, in words.
    settings: keys of the recipe's section `data` that are set, without `train`.
    objective: that trains on such examples.
    generation: of the answers that the model writes in training; their lengths are in `lengths`.
    duplicates: share of the examples; None: not counted.
    files: of images and recordings.
    pictures: of conversations with images.
    own_sections: sections of a recipe beside `data` that are set for these examples.
    """

    source: str
    task: str
    rows: int
    lengths: np.ndarray
    supervised_share: float = 1.0
    duplicates: float | None = 0.0
    labels: dict[str, int] = field(default_factory=dict)
    many: bool = False
    targets: dict[str, tuple[float, float]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list, repr=False)
    text_labels: list[str] = field(default_factory=list, repr=False)
    max_length: int = 1024
    format: str = ""
    estimated: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    objective: str = "sft"
    generation: Generation | None = None
    files: Files | None = None
    pictures: Pictures | None = None
    own_sections: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """Of an example: a preference has two, a prompt has those of its answers."""
        if self.generation is not None:
            return self.generation.answers
        return 2 if self.objective != "sft" and not OBJECTIVES[self.objective].generates else 1

    @property
    def limit(self) -> int:
        """Tokens of an example at most."""
        answer = self.generation.tokens if self.generation is not None else 0
        return (self.max_length + answer) * self.sequences

    @property
    def tokens(self) -> float:
        """Tokens of all examples, truncated to `max_length`."""
        return self.rows * self.mean_length

    @property
    def longest(self) -> int:
        return int(min(self.limit, self.lengths.max()))

    @property
    def outputs(self) -> int:
        """Outputs of a head: one for each label or number; 0 where text is generated."""
        return len(self.labels) or len(self.targets)

    @property
    def pieces(self) -> np.ndarray:
        """Lengths of the sampled examples in training: truncated for a head, split otherwise."""
        full, rest = np.divmod(self.lengths, self.max_length)
        split = np.concatenate([np.full(int(full.sum()), self.max_length), rest[rest > 0]])
        return self.cut_lengths if self.outputs or self.objective != "sft" else split

    @property
    def cut_lengths(self) -> np.ndarray:
        return np.minimum(self.lengths, self.limit)

    @property
    def mean_length(self) -> float:
        return float(self.cut_lengths.mean())

    @property
    def prompt_length(self) -> float:
        """Average tokens of a prompt, where the model writes the answers."""
        return self.mean_length / self.sequences - (self.generation.tokens if self.generation is not None else 0)

    @property
    def cut_share(self) -> float:
        """Share of the tokens beyond `max_length`."""
        return 1 - float(self.cut_lengths.sum() / self.lengths.sum())

    @property
    def by_hand(self) -> bool:
        return self.source == BY_HAND

    @property
    def sections(self) -> dict[str, Any]:
        """Further sections of a recipe for these examples."""
        return self.files.given.sections if self.files is not None else self.own_sections

    @property
    def reading(self) -> float:
        """Seconds to decode an example."""
        found = self.files or self.pictures
        return found.reading if found is not None else 0.0

    def scratch(self, parameters: float) -> tuple[Survey, str, dict[str, Any]]:
        """These files as a model with random weights is given them, its family, and keys of its config."""
        assert self.files is not None
        given, family, config = self.files.given.scratch(self.files.headers, parameters)
        own = replace(self, files=replace(self.files, given=given))
        own.lengths = own.files.lengths if own.files is not None else own.lengths
        own.max_length = int(own.lengths.max())
        return own, family, config

    def lines(self) -> list[str]:
        """The statistics in words."""
        if self.by_hand:
            classes = f", {len(self.labels):,} classes of {min(self.labels.values()):,} examples" if self.labels else ""
            return [
                f"sizes given by hand: {self.rows:,} examples{classes}, about {self.tokens:,.0f} tokens",
                f"unknown: lengths, class balance, duplicates; every example is assumed to have {self.longest:,} tokens",
            ]
        if self.files is not None:
            found = [
                f"{self.source}: {self.rows:,} {self.files.plural} ({self.format})",
                *self.files.given.lines(self.files.headers),
            ]
            return [*found, *self._of_labels(), *self.remarks, *(f"estimated: {words}" for words in self.estimated)]
        middle, high = np.percentile(self.lengths, (50, 99))
        of = "" if self.objective == "sft" else " (of two sequences)"
        share = "" if self.outputs else f", {self.supervised_share:.0%} of them supervised"
        found = [
            f"{self.source}: {plural(self.rows, 'example')} ({self.format}), about {self.tokens:,.0f} tokens{share}",
            f"lengths in tokens{of}: median {middle:,.0f}, 99th percentile {high:,.0f}, maximum {self.lengths.max():,}; "
            f"max_length {self.max_length:,} cuts off {self.cut_share:.1%} of the tokens"
            + (f"; {self.duplicates:.1%} duplicate examples" if self.duplicates is not None else ""),
            *([self.pictures.line(self.lengths)] if self.pictures is not None else []),
            *self._of_labels(),
        ]
        for name, (mean, std) in self.targets.items():
            found.append(f"{name}: mean {mean:.4g}, standard deviation {std:.4g}, the RMSE of always predicting the mean")
        return found + self.remarks + [f"estimated: {words}" for words in self.estimated]

    def _of_labels(self) -> list[str]:
        """The classes in words: each of the files of a few classes, and the constant prediction."""
        if not self.labels:
            return []
        small, large = (pick(self.labels, key=lambda name: self.labels[name]) for pick in (min, max))
        share = f"{self.labels[large] / max(1, sum(self.labels.values())):.1%}"
        found = [
            f"{len(self.labels):,} classes, from {small} ({plural(self.labels[small], 'example')}) to {large} "
            f"({self.labels[large]:,}); always predicting {large} has an accuracy of {share}"
        ]
        if self.files is not None and self.labels[small] == self.labels[large]:
            return [f"{len(self.labels):,} classes of {plural(self.labels[large], 'example')} each"]
        if self.files is not None and 2 < len(self.labels) <= NAMED:
            found.append(", ".join(f"{name}: {count:,}" for name, count in self.labels.items()))
        return found


def by_hand(rows: int, tokens: int, task: str, classes: int, context: int) -> Survey:
    """Statistics given by hand, for data that does not exist yet. Raises UserError for impossible numbers."""
    if rows < 1:
        raise UserError(f"--rows: {rows}: expected at least 1")
    if tokens < rows:
        raise UserError(f"--tokens: {tokens} tokens for {rows} rows; expected the total number of tokens of all rows")
    headed = not TASKS[task].text.generates
    labeled = headed and TASKS[task].metrics.of_distributions
    if labeled and classes < 2:
        raise UserError("--classes: missing; give the number of labels, such as --classes 3")
    each = max(8, min(context, -(-tokens // rows)))
    labels = {f"class {n}": rows // classes for n in range(classes)} if labeled else {}
    lengths = np.full(1, each)
    if classes and not labeled:
        raise UserError(f"--classes: task {task} has no classes; remove the option, or set --task text-classification")
    targets = {"target": (0.0, 1.0)} if headed and not labeled else {}
    return Survey(BY_HAND, task, rows, lengths, labels=labels, targets=targets, max_length=each, format="sizes given by hand")


def survey(data: Data, task: str | None, context: int, folder: Path | None, prompts_for: str = "") -> Survey:
    """Statistics of local files, those of the first source.

    Args:
        data: the source, and how its rows are read.
        task: None: detected from the columns.
        context: the longest sequence of the model, which limits the proposed `max_length`.
        folder: of the model, whose tokenizer.json counts tokens if it exists.
        prompts_for: the objective that reads no more than prompts of the rows.

    Raises:
        UserError: files that do not exist, cannot be read, or fit no task.
    """
    first = data.train[0]
    files = sources.local_files(first.path, "--data", sources.splits_of(first, data, "data.train")[1])
    if files is None:
        raise UserError(
            f"--data: {first.path}: no such file; advise reads local files only (or give --rows and --tokens by hand)"
        )
    source = sources.DataSource(first, data, files, None)
    try:
        rows, estimate = _read(source)
        examples, found = _parse(source, task, rows, prompts_for)
        _check(examples, found, len(rows), data)
    except UserError as error:
        raise UserError(str(error) if key_of(str(error)) else f"--data: {error}") from None
    examples = [example for example in examples if example.has_target]
    found.rows = round(estimate * len(examples) / len(rows)) if estimate else len(examples)
    if estimate:
        found.estimated.append(f"the number of examples, from the first {len(rows):,} and the size of the files")
    found.duplicates = 1 - len({example.content for example in examples}) / len(examples)
    chosen = examples[:: max(1, len(examples) // SAMPLE)][:SAMPLE]
    found.texts = [example.content for example in chosen]
    if found.labels and not found.many:
        found.text_labels = [example.labels[0] for example in chosen]
    found.labels = {name: count * found.rows // len(examples) for name, count in found.labels.items()}
    sequences = _tokenize(found, chosen, folder)
    if len(chosen) < len(examples):
        found.estimated.append(f"tokens and lengths, from {len(chosen):,} examples")
    is_set = "max_length" in data.model_fields_set
    found.max_length = min(data.max_length, context) if is_set else proposed_length(sequences, context)
    found.settings = data.model_dump(exclude_unset=True, exclude={"train"})
    return found


def _parse(source: sources.DataSource, task: str | None, rows: list[Row], prompts_for: str = "") -> tuple[list[Any], Survey]:
    """All examples, and a survey without their statistics."""
    path, head = source.source.path, rows[: readers.HEAD_ROWS]
    objective, read = (prompts_for, PromptFormat.detect) if prompts_for else ("sft", None)
    if not prompts_for and task in (None, CausalLM.name):
        objective, read = preferences_of(source, head)
    if objective != "sft":
        task = CausalLM.name
    task = task or task_of_rows(head, path, source.class_names, source.data).name
    source.detect = read or TASKS[task].rows.reader
    reading = source.read()[1]
    examples, stats = [], Statistics(path, rows_read=len(rows), warnings=[*reading.remarks, *source.remarks()])
    for number, row in enumerate(rows):
        try:
            examples.append(reading.example(row))
        except BadRow as error:
            raise UserError(f"{reading.where(number)}: {error}") from None
        stats.note(reading.unread(row), examples[-1].changes)
    has_head, has_labels = not TASKS[task].text.generates, TASKS[task].metrics.of_distributions
    found = Survey(path, task, len(rows), np.ones(1, dtype=np.int64), format=reading.kind, many=has_head and reading.many)
    found.objective, found.remarks = objective, stats.remarks()
    if objective not in ("sft", prompts_for):
        found.remarks.append(
            f"preferences: `objective: {objective}`{' (or orpo, simpo)' * (objective == 'dpo')}; a base model that was not "
            "trained to answer first needs `objective: sft` on the good answers"
        )
    if has_head and not has_labels:
        found.targets = _targets(reading.target_names, examples, path)
    if has_head and has_labels:
        found.labels = dict(Counter(label for e in examples if e.has_target for label in e.labels).most_common())
        found.remarks += similar_labels(found.labels)
    return examples, found


def preferences_of(source: sources.DataSource, head: list[Row]) -> tuple[str, Callable[..., Any] | None]:
    """The objective that the first rows are for, and how they are read where it is a preference objective."""
    wanted, columns = source.wanted
    for objective, reader in (("dpo", PreferenceFormat.detect), ("kto", LabeledFormat.detect)):
        with contextlib.suppress(UserError):
            reader(filled(head), source.source.path, wanted, columns)
            return objective, reader
    return "sft", None


def _check(examples: list[Any], found: Survey, rows: int, data: Data) -> None:
    """Refuse what training would refuse. Raises UserError."""
    blank = sum(not example.has_target for example in examples)
    if TASKS[found.task].text.generates:
        check_rows(Statistics(found.source, rows_read=rows, rows_blank=blank), data)
    else:
        check_blank(found.source, rows, blank)
    if not TASKS[found.task].text.generates and TASKS[found.task].metrics.of_distributions:
        check_labels(rows - blank, sort_labels(found.labels), found.many, found.source)
    if blank:
        found.remarks.append(f"{blank:,} of {rows:,} rows have nothing to train on, and are dropped")


def _targets(names: list[str], examples: list[Any], path: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each number. Raises UserError for one that does not vary."""
    values = np.asarray([example.labels for example in examples], dtype=np.float64)
    found = {name: (float(column.mean()), float(column.std())) for name, column in zip(names, values.T, strict=True)}
    if still := next((name for name, (mean, std) in found.items() if std <= 1e-12 * max(abs(mean), 1e-300)), None):
        raise UserError(f"{path}: '{still}' is {found[still][0]:g} in all training rows; expected numbers that vary")
    return found


def _read(source: sources.DataSource) -> tuple[list[Row], int]:
    """The first rows, and the total number of rows if it was estimated (otherwise 0)."""
    stream, files = source.rows(), source.files or []
    rows = list(itertools.islice(stream, MOST_READ))
    if not rows:
        raise UserError(f"{source.source.path}: it has no rows; expected at least one")
    if len(rows) < MOST_READ or next(stream, None) is None:
        return rows, 0
    if any(file.suffix in (".gz", ".parquet", ".arrow") for file in files):
        return rows, len(rows) + 1 + sum(1 for _ in stream)
    read = sum(len(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")) for row in rows)
    return rows, max(len(rows), round(sum(file.stat().st_size for file in files) / read * len(rows)))


def proposed_length(lengths: np.ndarray, context: int) -> int:
    """The smallest multiple of 16 within the context that covers nearly all tokens."""
    top = int(min(context, lengths.max()))
    for length in range(16, top, 16):
        if np.minimum(lengths, length).sum() >= KEPT * lengths.sum():
            return length
    return max(16, min(-(-top // 16) * 16, context))


def _tokenize(found: Survey, examples: list[Any], folder: Path | None) -> np.ndarray:
    """Count the tokens of the sampled examples, including those that a chat template would add; returns the lengths of their
    longest sequences, which are shorter where an example has two."""
    pieces = [_pieces(example) for example in examples]
    texts = [text for row in pieces for text, _ in row]
    counts = count_tokens(texts, folder)
    if counts is None:
        counts = [max(1, round(len(text.encode()) / BYTES_PER_TOKEN)) for text in texts]
        found.estimated.append(f"tokens, at {BYTES_PER_TOKEN:g} bytes per token, because the model has no tokenizer.json here")
    place, lengths, longest, supervised = 0, list[int](), list[int](), 0
    for row in pieces:
        marks = TURN_TOKENS if len(row) > 1 else 1
        each = [count + marks for count in counts[place : place + len(row)]]
        supervised += sum(count for count, (_, trained) in zip(each, row, strict=True) if trained)
        lengths.append(sum(each))
        half = len(each) // 2 if found.sequences == 2 else 0
        longest.append(max(sum(each[:half]), sum(each[half:])))
        place += len(row)
    if any(len(row) > 1 for row in pieces) and TASKS[found.task].text.generates:
        found.estimated.append(f"the chat template, at {TURN_TOKENS} tokens per message")
    found.lengths = np.asarray(lengths, dtype=np.int64)
    found.supervised_share = supervised / max(1, sum(lengths))
    return np.asarray(longest, dtype=np.int64)


def _pieces(example: Any) -> list[tuple[str, bool]]:
    """The texts of an example, and whether each is supervised."""
    if isinstance(example, Preference):
        both = example.examples() * (2 if len(example.answers) == 1 else 1)  # kto compares with another answer
        return [piece for each in both for piece in _pieces(each)]
    if isinstance(example, Prompt):
        return [(str(turn["content"]), False) for turn in example.messages]
    if not isinstance(example, Example):
        return [(example.content, True)]
    if example.text is not None:
        return [(example.text, True)]
    messages = example.messages or []
    return [
        (str(message["content"]), message["role"] == "assistant" and index >= example.prompt_turns)
        for index, message in enumerate(messages)
    ]


def count_tokens(texts: list[str], folder: Path | None) -> list[int] | None:
    """Tokens of each text without special tokens; None if the model folder has no tokenizer.json."""
    file = folder / "tokenizer.json" if folder else None
    if file is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(each.ids) for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
