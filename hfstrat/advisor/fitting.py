"""Does a candidate fit into the memory, and with what: as it is, row by row, with recomputed activations, with processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from hfstrat.advisor import memory
from hfstrat.advisor.activations import of_batches
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.data import Survey
from hfstrat.advisor.hardware import HEADROOM, Device, Sharing
from hfstrat.advisor.memory import Prediction, Shape
from hfstrat.trainer.plan import modest_eval_batch, modest_micro_batch

GLOBAL_BATCH = 16
PROCESSES = (2, 4, 8, 16, 32, 64, 128)
NF4_BYTES = 0.57  # of a weight: 4 bits and the scales of blocks of 64 (arXiv 2305.14314)


class Fit(NamedTuple):
    """The first way in which a candidate fits (`kind`: as it is, with settings, with processes, not), and its prediction."""

    kind: str
    words: str
    prediction: Prediction
    shape: Shape
    settings: dict[str, object]

    @property
    def peak(self) -> float:
        """Of the process as `report.json` has it: on a CPU what the imports take is part of it."""
        return self.prediction.total + imports(self.shape.on_cpu)

    @property
    def fits_here(self) -> bool:
        return self.kind in ("fits", "fits with")


def imports(on_cpu: bool) -> float:
    return float(memory.constants()["cpu"]["imports"]) if on_cpu else 0.0


def fit(
    candidate: Candidate, data: Survey, device: Device, limit: float, sharing: Sharing, compute: int, quantizes: bool = False
) -> Fit:
    """Try from the most comfortable to the most modest.

    Args:
        limit: bytes of memory of one device.
        compute: bytes of a number in the forward pass.
        quantizes: whether frozen weights can be quantized here.
    """
    model, learning = candidate.model, candidate.learning
    assert model is not None
    assert learning is not None
    room, tried = HEADROOM * limit - imports(device.is_cpu), list(_shapes(candidate, data, device, sharing, compute, quantizes))
    predictions = [(shape, words, memory.predict(model, learning, shape, sharing)) for shape, words in tried]
    for shape, words, found in predictions:
        if found.total <= room:
            return Fit("fits with" if words else "fits", words, found, shape, _settings(shape, words))
    least, words, found = min(predictions, key=lambda each: each[2].total)
    for processes in () if device.is_cpu else PROCESSES:  # those of a CPU share its memory, and FSDP has none there
        shared = Sharing("fsdp2", processes, True, True, True)
        divided = memory.predict(model, learning, least, shared)
        if processes > sharing.processes and divided.total <= room:
            said = f"{processes} processes (fsdp2)" + (f" and {words}" if words else "")
            return Fit("fits with more", said, divided, least, _settings(least, words))
    return Fit("does not fit", "", found, least, {})


def _shapes(
    candidate: Candidate, data: Survey, device: Device, sharing: Sharing, compute: int, quantizes: bool
) -> Iterator[tuple[Shape, str]]:
    """Shapes of a pass, each with what it takes in words; the first needs no setting."""
    share = max(1, GLOBAL_BATCH // sharing.processes)
    micro = modest_micro_batch(share, data.cut_lengths)
    once = candidate.learning is not None and candidate.learning.body_once
    yield shape_of(data, (micro, share, modest_eval_batch(micro, data.longest)), once, device.is_cpu, compute), ""
    small = shape_of(data, (1, share, 1), once, device.is_cpu, compute)
    if micro > 1:
        yield small, "one row at a time"
    if candidate.learning is None or once:
        return
    yield replace(small, recompute=True), "activations recomputed (activation_checkpointing)"
    if quantizes and candidate.learning.rank:
        yield replace(small, recompute=True, frozen=NF4_BYTES), "activations recomputed, the base in 4 bits (nf4)"


def shape_of(data: Survey, sizes: tuple[int, int, int], once: bool, on_cpu: bool, compute: int) -> Shape:
    """The passes of a run of one process on these rows.

    Args:
        sizes: rows of a pass, of a step, and of a pass in evaluation.
        once: the body runs once over all rows.
        compute: bytes of a number in the forward pass.
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
        classifies=bool(data.labels),
        widths=of_batches(data.pieces, micro, share, eval_rows, once),
    )


def _settings(shape: Shape, words: str) -> dict[str, object]:
    """Keys of `training:` that make a run of this shape."""
    if not words:
        return {}
    found: dict[str, object] = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    return found | ({"activation_checkpointing": True} if shape.recompute else {})
