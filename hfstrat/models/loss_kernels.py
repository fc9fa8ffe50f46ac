"""The kernel of the head's loss on a GPU: ours, TRL's or Liger's, the fastest with the same results.

Measured at the start of a run, forward and backward, on hidden states of the model. Another kernel is chosen only if it is at
least 5% faster, needs at most 25% more memory and gives the same results; otherwise the reason is printed. All three stay until
a benchmark on GPUs shows that two are enough.
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
from hfstrat.models.chunked_loss import Head, Kernel, head_loss
from hfstrat.recipe.format import memory, percent

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hfstrat.models.load import Base

MAX_TOKENS = 4096  # that are measured
REPEATS = 5
MAX_TIME = 0.95  # of our time
MAX_MEMORY = 1.25  # of our memory
TOLERANCE = {4: 1e-3, 2: 3e-2}  # relative distance from our result, by the bytes of the dtype of products
VOCABULARY_TILE = 8192  # TRL's default


def trl(rows: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction

    given = (rows, head.weight, head.bias, targets, 1.0, VOCABULARY_TILE, head.softcap, head.scale, ())
    total: torch.Tensor = -ChunkedLogProbFunction.apply(*given)[0].sum()
    return total


def liger(rows: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    scaled, bias = (one if one is None or head.scale == 1.0 else one * head.scale for one in (rows, head.bias))
    # class weights, ignored target, factor of the z-loss, label smoothing, reduction, soft-capping, return z-loss, dtype
    given = (None, -100, 0.0, 0.0, "sum", head.softcap, False, torch.float32)
    total: torch.Tensor = LigerFusedLinearCrossEntropyFunction.apply(scaled, head.weight, targets, bias, *given)[0]
    return total


class Measured(NamedTuple):
    """The median time of a forward and backward pass, the memory that it allocated, and its results."""

    seconds: float
    bytes: int
    results: list[torch.Tensor]


def installed() -> dict[str, Kernel]:
    return {"hfstrat": head_loss, "trl": trl, **({"liger": liger} if importlib.util.find_spec("liger_kernel") else {})}


def kernel_name(trained: nn.Module) -> str:
    """The name of the kernel that computes the loss of a model's head."""
    kernel = getattr(fused_loss.objective_of(trained), "keywords", {}).get("kernel", head_loss)
    return "hfstrat" if kernel is head_loss else str(kernel.__name__)


def choose_for(
    base: Base, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, before: str | None, processes: int = 1
) -> None:
    """Bind the best kernel to the model's head.

    Args:
        shape: rows and tokens of a forward pass.
        dtype: of autocast.
        before: the kernel at the start of a resumed run, which is kept.
    """
    model, found = base.model, installed()
    if not _applies(model):
        return
    name = before or ""
    if name not in found:
        if name:
            base.say(f"head: the loss kernel was {name}, which is not installed here; kernels are measured again")
        try:
            name, text = fastest(model, found, shape, dtype, device)
        except torch.OutOfMemoryError:
            name, text = "hfstrat", "loss kernel hfstrat (not enough memory to measure others)"
        base.say(f"head: {text}")
    name = _broadcast(name, processes)
    fused_loss.unbind_head_loss(model)
    fused_loss.bind_head_loss(model, partial(fused_loss.cross_entropy, kernel=found[name]))


def _applies(model: PreTrainedModel) -> bool:
    """Whether the objective is the cross-entropy of a plain head."""
    return fused_loss.objective_of(model) is fused_loss.cross_entropy and fused_loss.is_plain(model.get_output_embeddings())


def _broadcast(name: str, processes: int) -> str:
    """The choice of the first process."""
    if processes == 1:
        return name
    from accelerate.utils import broadcast_object_list

    return str(broadcast_object_list([name])[0])


def fastest(
    model: PreTrainedModel, kernels: dict[str, Kernel], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """The name of the fastest kernel with our results, and a line about the measurements."""
    lm_head, bound = model.get_output_embeddings(), model.forward
    count = max(1, min(shape[0], MAX_TOKENS // shape[1]))
    ids = torch.randint(len(lm_head.weight), (count, shape[1]), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = fused_loss.last_hidden(model, (), {"input_ids": ids})
    head, targets = Head(lm_head.weight, lm_head.bias, bound.softcap, bound.scale), ids.flatten()  # type: ignore[attr-defined]
    measured, refused = dict[str, Measured](), dict[str, str]()
    for name, kernel in kernels.items():
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                measured[name] = measure(kernel, hidden, head, targets)
        except Exception as error:  # third-party kernels, on untested hardware
            if name == "hfstrat":
                raise
            refused[name] = f"fails here ({first_line(error)})"
    return decide(measured, refused, TOLERANCE[min(4, dtype.itemsize)])


def measure(kernel: Kernel, hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> Measured:
    rows = hidden.detach().requires_grad_(True)
    wanted = [rows, *(one for one in (head.weight, head.bias) if one is not None and one.requires_grad)]
    seconds, on_gpu = [], rows.is_cuda
    for repeat in range(REPEATS + 1):  # the first one includes compilation
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
    """The fastest kernel that is as good as ours; `allowed` is the relative distance of its results from ours."""
    ours, best = measured["hfstrat"], "hfstrat"
    for name, one in measured.items():
        apart = [
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(one.results, ours.results, strict=True)
        ]
        if not all(each <= allowed for each in apart):  # also for nan
            refused[name] = f"gives other results ({percent(max(apart))} difference)"
        elif one.bytes > MAX_MEMORY * ours.bytes and name != "hfstrat":
            refused[name] = f"needs {memory(one.bytes)} instead of {memory(ours.bytes)}"
        elif one.seconds < min(MAX_TIME * ours.seconds, measured[best].seconds):
            best = name
    times = ", ".join(f"{name} {one.seconds * 1e3:.1f} ms" for name, one in measured.items())
    whys = "".join(f"; {name} {why}" for name, why in refused.items())
    return best, f"loss kernel {best} ({times} for {len(ours.results[1]):,} tokens{whys})"
