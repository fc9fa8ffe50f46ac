"""Who computes the head's loss on a GPU: hfstrat, TRL or Liger, whichever is fastest there and says the same.

Measured at the start of a run, forward and backward, on hidden states of the model in use. What is slower by less than a
twentieth, takes a quarter more memory, says something else or fails is not taken, and the reason is printed.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from hfstrat.errors import first_line
from hfstrat.models import fused_loss
from hfstrat.models.chunked_loss import Head, Kernel, hfstrat

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hfstrat.models.load import Base

TOKENS = 4096  # at most, that are measured
REPEATS = 5
GAIN = 0.95  # of our time, at most
ROOM = 1.25  # times our memory, at most
ALLOWED = {4: 1e-3, 2: 3e-2}  # distance from ours over its size, by the bytes of what products are computed in
VOCABULARY_TILE = 8192  # TRL's own


def trl(rows: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction

    given = (rows, head.weight, head.bias, targets, 1.0, VOCABULARY_TILE, head.softcap, head.scale, ())
    total: torch.Tensor = -ChunkedLogProbFunction.apply(*given)[0].sum()
    return total


def liger(rows: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    scaled, bias = (one if one is None or head.scale == 1.0 else one * head.scale for one in (rows, head.bias))
    # class weights, ignored target, factor of the squared log-sum, smoothing; whether the last of these comes back too
    given = (None, -100, 0.0, 0.0, "sum", head.softcap, False, torch.float32)
    total: torch.Tensor = LigerFusedLinearCrossEntropyFunction.apply(scaled, head.weight, targets, bias, *given)[0]
    return total


class Measured(NamedTuple):
    """The median time of a forward and backward pass, memory beside what was there, and what came out."""

    seconds: float
    bytes: int
    results: list[torch.Tensor]


def installed() -> dict[str, Kernel]:
    return {"hfstrat": hfstrat, "trl": trl, **({"liger": liger} if importlib.util.find_spec("liger_kernel") else {})}


def in_use(trained: nn.Module) -> str:
    """The name of what computes the loss of a model's head."""
    kernel = getattr(fused_loss.objective_of(trained), "keywords", {}).get("kernel", hfstrat)
    return str(kernel.__name__)


def choose_for(
    base: Base, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, before: str | None, processes: int = 1
) -> None:
    """Have the model's head take the best kernel.

    Args:
        shape: of a forward pass: rows, tokens.
        dtype: of autocast.
        before: what a resumed run was begun with, which it goes on with.
    """
    model, found = base.model, installed()
    if not _applies(model):
        return
    name = before or ""
    if name not in found:
        if name:
            base.say(f"head: its loss came from {name}, which is not installed here; measured anew")
        try:
            name, said = chosen(model, found, shape, dtype, device)
        except torch.OutOfMemoryError:
            name, said = "hfstrat", "its loss by hfstrat: there was no room to measure others"
        base.say(f"head: {said}")
    name = _agreed(name, processes)
    fused_loss.unbind_head_loss(model)
    fused_loss.bind_head_loss(model, partial(fused_loss.cross_entropy, kernel=found[name]))


def _applies(model: PreTrainedModel) -> bool:
    """Whether it is the plain loss of a plain head."""
    return fused_loss.objective_of(model) is fused_loss.cross_entropy and fused_loss.is_plain(model.get_output_embeddings())


def _agreed(name: str, processes: int) -> str:
    """What the first process chose."""
    if processes == 1:
        return name
    from accelerate.utils import broadcast_object_list

    return str(broadcast_object_list([name])[0])


def chosen(
    model: PreTrainedModel, kernels: dict[str, Kernel], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """The name of the fastest kernel that says what ours says, and what was found, in words."""
    lm_head, bound = model.get_output_embeddings(), model.forward
    count = max(1, min(shape[0], TOKENS // shape[1]))
    ids = torch.randint(len(lm_head.weight), (count, shape[1]), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = fused_loss.last_hidden(model, (), {"input_ids": ids}).flatten(0, 1)
    head, targets = Head(lm_head.weight, lm_head.bias, bound.softcap, bound.scale), ids.flatten()  # type: ignore[attr-defined]
    measured, refused = dict[str, Measured](), dict[str, str]()
    for name, kernel in kernels.items():
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                measured[name] = measure(kernel, hidden, head, targets)
        except Exception as error:  # a kernel of others, on hardware that nobody has seen
            if name == "hfstrat":
                raise
            refused[name] = f"fails here ({first_line(error)})"
    return decide(measured, refused, ALLOWED[min(4, dtype.itemsize)])


def measure(kernel: Kernel, hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> Measured:
    rows = hidden.detach().requires_grad_(True)
    wanted = [rows, *(one for one in (head.weight, head.bias) if one is not None and one.requires_grad)]
    seconds, on_gpu = [], rows.is_cuda
    for repeat in range(REPEATS + 1):  # the first one compiles
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
        total = kernel(rows, head, targets)
        gradients = torch.autograd.grad(total, wanted)
        if on_gpu:
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - started] if repeat else []
        taken = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return Measured(statistics.median(seconds), taken, [total.detach(), *gradients])


def decide(measured: dict[str, Measured], refused: dict[str, str], allowed: float) -> tuple[str, str]:
    """The fastest that is as good as ours; `allowed`: the distance of a result from ours, over its size."""
    ours, best = measured["hfstrat"], "hfstrat"
    for name, one in measured.items():
        apart = [
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(one.results, ours.results, strict=True)
        ]
        if not all(each <= allowed for each in apart):  # nan is not
            refused[name] = f"says something else ({max(apart):.1%} away)"
        elif one.bytes > ROOM * ours.bytes and name != "hfstrat":
            refused[name] = f"takes {one.bytes / 2**20:,.0f} MiB where hfstrat takes {ours.bytes / 2**20:,.0f}"
        elif one.seconds < min(GAIN * ours.seconds, measured[best].seconds):
            best = name
    times = ", ".join(f"{name} {one.seconds * 1e3:.1f} ms" for name, one in measured.items())
    whys = "".join(f"; {name} {why}" for name, why in refused.items())
    return best, f"its loss by {best}, of {times} for {len(ours.results[1]):,} tokens{whys}"
