"""The forgetting check: the loss on a text that training does not see, before and after.

The passages that come with hfstrat are written for it: plain statements, stories, instructions, dialogue, arithmetic, code and
a few other languages. What counts is the difference; its own size says little. Catastrophic forgetting in fine-tuned LLMs: Luo
et al. 2023, arXiv 2308.08747.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hfstrat.data.batches import Collator
from hfstrat.evaluation.intervals import Found
from hfstrat.evaluation.loop import Runner
from hfstrat.evaluation.subject import Subject
from hfstrat.model import takes_logits_mask

FILE = Path(__file__).with_name("control.txt")
LENGTH = 512  # tokens of a passage, at most


def passages(source: str) -> list[str]:
    """`auto`: those that come with hfstrat, between blank lines; else the texts of a file."""
    if source == "auto":
        return [" ".join(text.split("\n")) if "    " not in text else text for text in _blocks(FILE.read_text("utf-8"))]
    from hfstrat.data import readers

    rows = readers.read(Path(source).expanduser())
    return [str(row.get("text") or next(iter(row.values()))) for row in rows]


def _blocks(text: str) -> list[str]:
    return [block.strip("\n") for block in text.split("\n\n") if block.strip()]


def measure(subject: Subject, source: str, runner: Runner) -> Found:
    """Loss, perplexity, token accuracy and, where the tokenizer tells, bits per byte: all tokens but the first carry loss."""
    from hfstrat.token_bytes import token_bytes

    tokenizer, texts = subject.tokenizer, passages(source)
    limit = min(LENGTH, subject.context or LENGTH)
    ids = [row[:limit] for row in tokenizer(texts, verbose=False)["input_ids"]]
    ids = [row for row in ids if len(row) > 1]
    bound = "forward" in vars(subject.inner)
    collate = Collator(tokenizer.pad_token_id or 0, runner.multiple, takes_logits_mask(subject.inner), selects_rows=bound)

    def step(places: list[int]) -> Any:
        batch = collate([{"input_ids": ids[place], "labels": ids[place]} for place in places])
        return subject.task.sums(subject.model, {name: tensor.to(runner.device) for name, tensor in batch.items()})

    sums = runner.per_row("control text", np.array([len(row) for row in ids]), step)
    found = token_bytes(tokenizer)
    beside = (
        {} if found is None else {"bytes": np.array([found.of(np.array(row), np.array([0])).sum() for row in ids], dtype=float)}
    )
    order = hashlib.sha256(repr(ids).encode()).hexdigest()
    tokens = float(sums[0][:, 1].sum())
    name = "the passages that come with hfstrat" if source == "auto" else Path(source).name
    return Found(len(ids), subject.task.score(sums, (), beside), (), {"tokens": tokens}, {"text": name}, order=order)
