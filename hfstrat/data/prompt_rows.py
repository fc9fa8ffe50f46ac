"""Token rows of prompts: the ids that a model answers, without loss, and what its answers are scored by."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.data.coverage import Notes
from hfstrat.data.formats import hash_text
from hfstrat.data.prepare import RowEncoder
from hfstrat.data.prompts import NO_ANSWER, Prompt, PromptFormat
from hfstrat.data.render import IGNORED, RENDER_VERSION, Renderer
from hfstrat.data.sources import DataSource
from hfstrat.data.stats import Statistics, check_rows
from hfstrat.data.tokenize import BATCH, Writer, schema, take_notes
from hfstrat.data.values import BadRow, Row
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data

VERSION = 2  # of the token rows written here: increase it where they change


class PromptPart(NamedTuple):
    """A token row."""

    input_ids: list[int]
    labels: list[int]
    length: int
    row: int
    text_hash: int
    given: str


class PromptEncoder(RowEncoder):
    """Rows of prompts.

    Args:
        needs_answer: whether a reward compares with the answer of the row.
    """

    def __init__(self, renderer: Renderer, needs_answer: bool) -> None:
        super().__init__(renderer)
        self.needs_answer = needs_answer

    def reader(self, source: DataSource) -> Any:
        return PromptFormat.detect

    def options(self, source: DataSource) -> dict[str, Any]:
        given = {name: getattr(source.data, name) for name in ("max_length", "overflow", "chat_template_kwargs")}
        versions = {"render_version": RENDER_VERSION, "prompt_version": VERSION}
        return {"template": self.renderer.template, "needs_answer": self.needs_answer, **versions, **given}

    def reference(self, example: Prompt) -> str:
        return example.answer or ""

    def write(self, source: DataSource, target: Path) -> Statistics:
        return write_prompts(*source.read(), source.data, self.renderer, self.needs_answer, target)


def write_prompts(
    rows: Iterable[Row], reading: PromptFormat, data: Data, renderer: Renderer, needs_answer: bool, target: Path
) -> Statistics:
    """Write the token rows to an Arrow stream and return their statistics.

    Raises:
        UserError: rows that do not fit their format, or too many that cannot be answered.
    """
    import pyarrow as pa

    stats = Statistics(reading.source, f"{reading.kind} ({renderer.template} template)")
    stats.warnings += reading.remarks
    stats.tools_as_text = not renderer.supports_tools
    renderer.notes = Notes()
    columns, numbered, digest = schema(given=pa.string()), enumerate(rows), hashlib.sha256()
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
        writer = Writer(stream, columns)
        while batch := list(itertools.islice(numbered, BATCH)):
            found = (_part(index, row, reading, data, renderer, needs_answer, stats) for index, row in batch)
            parts = [part for part in found if part is not None]
            digest.update("\n".join(part.given for part in parts).encode())
            writer.add(parts)
        writer.flush()
    stats.sha256 = hashlib.sha256(f"{writer.digest.hexdigest()} {digest.hexdigest()}".encode()).hexdigest()
    take_notes(stats, renderer)
    stats.end_remark = ""  # it is about the end of trained answers
    check_rows(stats, data, can_split=False)
    if not stats.rows_kept:
        raise UserError(
            f"{stats.source}: no row is left: every prompt has more than data.max_length = {data.max_length} tokens"
        )
    return stats


def _part(
    index: int, row: Row, reading: PromptFormat, data: Data, renderer: Renderer, needs_answer: bool, stats: Statistics
) -> PromptPart | None:
    """The token row of a row; None if it is left out, which is counted."""
    stats.rows_read += 1
    try:
        found = reading.example(row)
        ids = [] if found.problem else renderer.prompt_ids(found.prompt)
    except BadRow as error:
        raise UserError(f"{reading.where(index)}: {error}") from None
    stats.note([], found.changes)
    stats.rows_with_tools += bool(found.tools)
    problem = found.problem or (NO_ANSWER if needs_answer and found.answer is None else "")
    if not problem and len(ids) > data.max_length:
        if data.overflow == "error":
            raise UserError(
                f"{reading.where(index)}: its prompt has {len(ids)} tokens, more than data.max_length = {data.max_length} "
                "(data.overflow: error)"
            )
        problem = f"a prompt of more than data.max_length = {data.max_length} tokens"
        if data.overflow == "drop":
            stats.rows_dropped += 1
            return None
    if problem:
        stats.unusable[problem] = stats.unusable.get(problem, 0) + 1
        stats.rows_dropped += 1
        return None
    stats.rows_kept += 1
    stats.tokens += len(ids)
    return PromptPart(ids, [IGNORED] * len(ids), len(ids), index, hash_text(found.content), found.given())
