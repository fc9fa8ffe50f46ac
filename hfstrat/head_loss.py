"""From hidden states to the summed loss and its gradients, a few rows at a time: no `[n, V]` tensor ever exists.

The gradients are computed in the forward pass, while a chunk's logits are at hand; the backward pass only scales
them. Pure PyTorch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 * 2**20  # of a chunk's float32 logits on a CPU: about its last cache
CHUNK_ROWS = 128  # at least: each chunk reads the whole weight, and with fewer rows that takes longer than the products
HAS_MIXED_PRODUCT = Version(torch.__version__) >= Version("2.8")  # 16-bit factors, float32 sum, on CUDA
GPU_CHUNK_BYTES = 256 * 2**20  # a GPU wants large matrix products more than a small footprint

RowsLoss = Callable[[slice, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a chunk's place, its logits `[c, V]` (to be left as they are) and memory of their size: the chunk's summed loss and
its gradient by these logits, which may be in that memory."""


class Head(NamedTuple):
    """A language model's head: logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Negative log-likelihood (nats) of `targets`, summed: a scalar, in float32 or wider.

    Only what requires a gradient gets one: a frozen head costs no gradient of its weight. No rows give a zero with
    zero gradients.

    Args:
        hidden: `[n, H]`, the rows that carry loss.
        weight: `[V, H]`, the LM head.
        targets: `[n]`, int64 in `[0, V)`.
        bias: `[V]`.
        softcap: c of `c * tanh(logits / c)`, after the scale.
        scale: factor of the logits.
        chunk: rows at a time; by default as many as keep the logits in cache.

    Raises:
        RuntimeError: shapes that do not fit, or a target outside the vocabulary.
    """
    if not torch.is_grad_enabled():
        return head_scores(hidden, weight, targets, bias, softcap, scale, chunk)[0].sum()
    return rows_loss(hidden, Head(weight, bias, softcap, scale), _cross_entropy(targets), chunk)


def rows_loss(hidden: torch.Tensor, head: Head, loss: RowsLoss, chunk: int | None = None) -> torch.Tensor:
    """The sum of any loss of logits, each row of which depends on its own logits alone; as `head_loss` in all else."""
    chunk = chunk or chunk_rows(head.weight, head.weight.requires_grad)
    dtype = compute_dtype(hidden, head.weight)
    total: torch.Tensor = _HeadLoss.apply(hidden, *head, chunk, dtype, loss)  # type: ignore[no-untyped-call]
    return total


def _cross_entropy(targets: torch.Tensor) -> RowsLoss:
    def loss(part: slice, logits: torch.Tensor, space: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = targets[part][:, None]
        gradient = torch.log_softmax(logits, -1, out=space)
        value = -gradient.gather(1, wanted).sum()
        return value, gradient.exp_().scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))

    return loss


@torch.no_grad()
def head_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row: negative log-likelihood (nats, `[n]`, float32 or wider) and whether the target is the top-1 guess (bool).

    Arguments and errors are those of `head_loss`; there is no gradient.
    """
    nll, right, space = [], [], None
    for part, _, logits in chunks(hidden, Head(weight, bias, softcap, scale), chunk):
        space = torch.empty_like(logits) if space is None else space[: len(logits)]  # fresh pages cost time
        right.append(logits.argmax(-1) == targets[part])
        nll.append(-torch.log_softmax(logits, -1, out=space).gather(1, targets[part][:, None])[:, 0])
    empty = torch.empty(0, dtype=loss_dtype(weight.dtype), device=hidden.device)
    return torch.cat([empty, *nll]), torch.cat([empty.bool(), *right])


def chunk_rows(weight: torch.Tensor, learns: bool) -> int:
    """Rows at a time: as many as keep the logits in cache, but not so few that the weight's way from memory dominates.

    The gradient of a weight that learns is read and written for each chunk too; it is as large as H rows of logits,
    so H/4 rows at a time cost little memory beside it.
    """
    vocabulary, width = weight.shape
    size = CHUNK_BYTES if weight.device.type == "cpu" else GPU_CHUNK_BYTES
    return max(CHUNK_ROWS, size // (4 * vocabulary), width // 4 if learns else 0)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        scale: float,
        chunk: int,
        dtype: torch.dtype,
        loss: RowsLoss,
    ) -> torch.Tensor:
        wide = loss_dtype(dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        learns = ctx.needs_input_grad
        for_hidden = torch.empty_like(hidden) if learns[0] else None
        for_weight = torch.zeros_like(weight, dtype=loss_dtype(weight.dtype)) if learns[1] else None
        for_bias = torch.zeros_like(bias, dtype=loss_dtype(bias.dtype)) if bias is not None and learns[2] else None
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), softcap, scale)
        space = torch.empty(min(chunk, len(hidden)), len(weight), dtype=wide, device=hidden.device)
        with without_autocast(hidden.device):
            for part, rows, logits in chunks(hidden, head, chunk, dtype):
                value, gradient = loss(part, logits, space[: len(rows)])
                total += value
                _through_softcap_(gradient, logits, softcap, scale)
                if for_bias is not None:
                    for_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if for_hidden is not None:
                    for_hidden[part] = gradient @ head.weight
                if for_weight is not None:
                    _add_product_(for_weight, gradient.T, rows)
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = (
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None, None, None


def chunks(
    hidden: torch.Tensor, head: Head, chunk: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """For each chunk: its slice, rows `[c, H]` in `dtype`, and logits `[c, V]` in float32 or wider (until the next)."""
    chunk = chunk or chunk_rows(head.weight, False)
    dtype = dtype or compute_dtype(hidden, head.weight)
    bias = None if head.bias is None else head.bias.to(dtype)
    head = head._replace(weight=head.weight.to(dtype), bias=bias)
    space = torch.empty(min(chunk, len(hidden)), len(head.weight), dtype=dtype, device=hidden.device)  # fresh pages cost time
    wide = torch.empty_like(space, dtype=loss_dtype(dtype)) if loss_dtype(dtype) != dtype else space
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        rows = hidden[part].to(dtype)
        with without_autocast(hidden.device):
            logits = project(rows, head, space[: len(rows)], wide[: len(rows)])
        yield part, rows, logits


def project(rows: torch.Tensor, head: Head, space: torch.Tensor, wide: torch.Tensor | None = None) -> torch.Tensor:
    """The logits `[c, V]`, in float32 or wider, of rows `[c, H]` of the head's dtype.

    Args:
        space: `[c, V]` of that dtype, written to.
        wide: `[c, V]` of the logits' dtype, written to where that is another one; None: memory of its own.
    """
    logits = torch.mm(rows, head.weight.T, out=space)
    if head.bias is not None:
        logits += head.bias
    if loss_dtype(logits.dtype) != logits.dtype:
        logits = logits.to(loss_dtype(logits.dtype)) if wide is None else wide.copy_(logits)
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _through_softcap_(gradient: torch.Tensor, logits: torch.Tensor, softcap: float | None, scale: float) -> None:
    """From the gradient of the final logits to that of the head's own product, in place; uses up `logits`."""
    if softcap is not None:
        gradient.mul_(logits.div_(softcap).square_().neg_().add_(1.0))  # tanh' = 1 - tanh^2
    if scale != 1.0:
        gradient *= scale


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, where no chunk's product is rounded to 16 bits before it is added."""
    if total.is_cuda and left.dtype.itemsize == 2 and total.dtype == torch.float32 and HAS_MIXED_PRODUCT:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What a linear layer would compute in: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def without_autocast(device: torch.device) -> Any:
    """The dtypes are chosen here; autocast would round the float32 sums."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
