"""Cached outputs of a teacher: their forms on disk, and the column of the dataset that holds them.

Only supervised positions are stored, starting with the one that predicts the first token of an answer. There are three forms:
the last hidden states, from which the teacher's head computes exact logits, at any temperature; tokens sampled from its
distribution, which give an unbiased estimate of the forward divergence (arXiv 2503.16870); or its most likely tokens with the
mass of the rest. A small top-k is not renormalized, since that would change the teacher's distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from hfstrat.data import cache
from hfstrat.data.render import IGNORED
from hfstrat.data.splits import distinct
from hfstrat.trainer.cached_columns import CachedColumnCollator, WithColumn, cache_inputs, read_column, write_column
from hfstrat.trainer.collective import Build
from hfstrat.trainer.train_data import TrainData

COLUMN = "teacher"
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Form:
    """A form of the cache.

    `kind`: hidden, sampled or top_k. `width`: of hidden states, or tokens per position. `dtype`: of hidden states.
    `temperature`: of sampled and most likely tokens.
    """

    kind: str
    width: int
    dtype: str = "float32"
    temperature: float = 1.0

    @property
    def position(self) -> np.dtype[Any]:
        """The data type of one position on disk."""
        if self.kind == "hidden":
            return np.dtype((np.dtype("int16" if self.dtype != "float32" else "float32"), (self.width,)))
        if self.kind == "sampled":
            return np.dtype([("ids", "<i4", (self.width,)), ("entropy", "<f4")])
        return np.dtype([("ids", "<i4", (self.width,)), ("logprobs", "<f4", (self.width,))])

    def tensors(self, blob: bytes) -> dict[str, torch.Tensor]:
        """The inputs of `Distiller`, from the concatenated bytes of all positions of a batch."""
        values = np.frombuffer(bytearray(blob), dtype=self.position)
        if self.kind == "hidden":
            hidden = torch.from_numpy(values)
            return {"teacher_hidden": hidden if self.dtype == "float32" else hidden.view(TORCH[self.dtype])}
        ids = torch.from_numpy(values["ids"].astype(np.int64))
        if self.kind == "top_k":
            return {"teacher_ids": ids, "teacher_logprobs": torch.from_numpy(values["logprobs"].copy())}
        weights = torch.full(ids.shape, 1 / self.width)
        return {"teacher_ids": ids, "teacher_weights": weights, "teacher_entropy": torch.from_numpy(values["entropy"].copy())}

    def bytes_of(self, hidden: torch.Tensor, logits: Any, generator: torch.Generator) -> tuple[bytes, float]:
        """The bytes of some positions (`hidden` `[n, H]`), and the summed probability mass that they contain.

        `logits` returns those of parts of the positions, `[c, V]`, over the shared vocabulary.
        """
        if self.kind == "hidden":
            states = hidden.to(TORCH[self.dtype]).cpu().contiguous()
            raw = states if self.dtype == "float32" else states.view(torch.int16)
            return raw.numpy().tobytes(), float(len(hidden))
        made, mass = np.empty(len(hidden), dtype=self.position), 0.0
        for part, chunk in logits(hidden):
            logprobs = torch.log_softmax(chunk / self.temperature, -1)
            chances = logprobs.exp()
            if self.kind == "top_k":
                values, ids = logprobs.topk(self.width)
                made["logprobs"][part] = values.cpu().numpy()
                mass += float(values.exp().sum())
            else:
                ids = torch.multinomial(chances.cpu(), self.width, replacement=True, generator=generator)
                made["entropy"][part] = -(chances * logprobs).sum(-1).cpu().numpy()
                seen = torch.zeros_like(chances, dtype=torch.bool).scatter_(1, ids.to(chances.device), True)
                mass += float((chances * seen).sum())
            made["ids"][part] = ids.cpu().numpy()
        return made.tobytes(), mass


class Rows(NamedTuple):
    """The distinct examples of a dataset: the index of their first occurrence, and the one that each example equals."""

    first: np.ndarray
    which: np.ndarray
    lengths: np.ndarray  # tokens of each distinct example
    supervised: np.ndarray  # and its supervised positions
    digest: str  # over their ids and labels

    @property
    def order(self) -> np.ndarray:
        """The order in which the distinct examples are computed: the longest first."""
        return np.lexsort((self.first, -self.lengths))

    @classmethod
    def of(cls, rows: Any) -> Rows:
        first, which = distinct(rows)
        digest, lengths, supervised = hashlib.sha256(), [], []
        for place in first:
            row = rows[int(place)]
            names = ("input_ids", "labels", "token_type_ids", "content")  # the last: a hash of images
            ids, labels, *others = (np.asarray(row.get(name, ()), dtype=np.int64) for name in names)
            digest.update(len(ids).to_bytes(8, "little") + b"".join(one.tobytes() for one in (ids, labels, *others)))
            lengths.append(len(ids))
            supervised.append(int((labels[1:] != IGNORED).sum()))
        return cls(first, which, np.array(lengths), np.array(supervised, dtype=np.int64), digest.hexdigest())


def write(target: Path | None, batches: Iterable[list[bytes]]) -> None:
    """Write the bytes of examples, batch by batch, as `write_column` does."""
    write_column(target, COLUMN, pa.large_binary(), (pa.array(blobs, pa.large_binary()) for blobs in batches))


class WithTeacher(WithColumn):
    """Examples with the outputs of the teacher that `write` wrote; `places` has the index in the file for each example."""

    def __init__(self, rows: Any, file: Path, places: np.ndarray) -> None:
        values = read_column(file, COLUMN)
        super().__init__(rows, COLUMN, lambda place: values[place].as_py(), places)


class Fetched(NamedTuple):
    """Examples with the cached outputs, the entry of the cache, and whether it was computed now."""

    rows: WithTeacher
    entry: cache.Entry
    is_new: bool


def fetch_outputs(
    data: TrainData,
    rows: Any,
    part: Rows,
    teacher: Any,
    weights: str,
    inputs: dict[str, Any],
    text: str,
    build: Build,
    needed: int,
) -> Fetched:
    """The outputs of a teacher for some examples, from the cache or from `build`.

    Args:
        rows: the examples, `part` the distinct ones of them.
        weights: digest of the teacher's weights.
        inputs: what the outputs depend on in addition to weights, examples and batches.
        text: description of the entry, of `needed` bytes.
    """
    inputs = {
        "teacher": weights,
        "rows": part.digest,
        "order": hashlib.sha256(part.first[part.order].tobytes()).hexdigest(),
        "batch": data.plan.eval_batch,
        "dtype": str(data.dtype),
        **inputs,
        **cache_inputs(data, teacher, data.dtype),
    }
    built: list[bool] = []

    def building(target: Path | None) -> Any:
        built.append(True)
        return build(target)

    entry = data.group.fetch("teacher", cache.fingerprint(inputs), text, building, needed)
    return Fetched(WithTeacher(rows, entry.path, np.argsort(part.order)[part.which]), entry, bool(built))


class TeacherCollator(CachedColumnCollator):
    """Adds the teacher's outputs at the supervised positions, in their order in the batch."""

    column = COLUMN

    def __init__(self, collate: Any, form: Form) -> None:
        super().__init__(collate)
        self.form = form

    def added(self, values: list[list[Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.form.tensors(b"".join(chain.from_iterable(values)))
