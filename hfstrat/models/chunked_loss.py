"""The summed loss and its gradients from hidden states, in chunks: the logits of all positions `[n, V]` never exist at once.

Gradients are computed in the forward pass, while the logits of a chunk exist; the backward pass only scales them. Matrix
products take a chunk of rows, everything else a block of these rows: allocating memory of a chunk's size takes longer than
filling it, and a block stays in the cache. Pure PyTorch, on any device: see `loss_kernels` for the alternatives on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hfstrat.models import rows_per_chunk

BLOCK_BYTES = 2**20  # of a block's float32 logits on a CPU: a few of these fit its second-level cache
ROW_MULTIPLE = 16  # of the rows of a product on a CPU
HAS_MIXED_PRODUCT = Version(torch.__version__) >= Version("2.8")  # 16-bit factors, float32 sum, on CUDA

RowsLoss = Callable[[slice, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From the slice of a block's rows, its logits `[b, V]` (not to be changed) and a buffer of their size to the summed loss of
the block and its gradient with respect to the logits, which may use the buffer."""


class Head(NamedTuple):
    """A language model's head: logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, layer: Any, softcap: float | None = None, scale: float = 1.0) -> Head:
        """The head of a linear layer, without gradients."""
        return cls(layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), softcap, scale)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Head:
        """The head with changed weight and bias: copied, moved, or reduced to some tokens."""
        return self._replace(weight=change(self.weight), bias=None if self.bias is None else change(self.bias))


def multiply_once(model: Any) -> AbstractContextManager[Any]:
    """Let a language model multiply the positions that it generates from with its head in one product.

    torch multiplies positions `[rows, 1, H]` that are a slice of a longer tensor with a frozen weight as one product per row,
    for which a CPU first copies the weight `[V, H]` for each row. With strides of their own they are one product.

    Returns:
        A context manager, after which the model is as before.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, torch.nn.Module):
        return nullcontext()
    handle: AbstractContextManager[Any] = head.register_forward_pre_hook(_dense)
    return handle


def _dense(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The same tensors; also dimensions of size 1 have the strides of a new tensor."""
    return tuple(each.contiguous().reshape(-1, each.shape[-1]).view(each.shape) for each in given)


Kernel = Callable[[torch.Tensor, Head, torch.Tensor], torch.Tensor]
"""From hidden states `[n, H]`, a head and targets `[n]` to the summed loss (nats), a scalar with gradients."""


def head_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """Negative log-likelihood (nats) of `targets`, summed: a scalar, in float32 or wider.

    Gradients are computed only where required: none for the weight of a frozen head. Without rows the result is zero, with
    zero gradients.

    Args:
        hidden: `[n, H]`, the supervised positions.
        targets: `[n]`, int64 in `[0, V)`.
        chunk: rows per product; by default as many as keep the logits in the cache.

    Raises:
        RuntimeError: shapes that do not match, or a target outside the vocabulary.
    """
    if not torch.is_grad_enabled():
        return head_scores(hidden, head, targets, chunk)[0].sum()
    return rows_loss(hidden, head, _cross_entropy(targets), chunk)


def rows_loss(hidden: torch.Tensor, head: Head, loss: RowsLoss, chunk: int | None = None) -> torch.Tensor:
    """The sum of any loss whose rows depend on their own logits only; otherwise as `head_loss`."""
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


def weighted_head_loss(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, weights: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """As `head_loss`, with the negative log-likelihood of each target times its weight (`[n]`, without gradients).

    It gives any function of the log-likelihoods its gradients: the weights are the function's derivatives with respect to them.
    """

    def loss(part: slice, logits: torch.Tensor, space: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted, weight = targets[part][:, None], weights[part][:, None].to(space.dtype)
        gradient = torch.log_softmax(logits, -1, out=space)
        value = -(gradient.gather(1, wanted) * weight).sum()
        gradient.exp_().scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))
        return value, gradient.mul_(weight)

    return rows_loss(hidden, head, loss, chunk)


@torch.no_grad()
def head_scores(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood (nats, `[n]`, float32 or wider) and whether the target is the top-1 prediction (`[n]`, bool).

    Arguments and errors are those of `head_loss`; there are no gradients.
    """
    nll, correct = [], []
    for part, logits in blocks(hidden, head, chunk):
        correct.append(logits.argmax(-1) == targets[part])
        nll.append(-functional.log_softmax(logits, -1).gather(1, targets[part][:, None])[:, 0])
    empty = torch.empty(0, dtype=loss_dtype(head.weight.dtype), device=hidden.device)
    return torch.cat([empty, *nll]), torch.cat([empty.bool(), *correct])


def chunk_rows(weight: torch.Tensor, trainable: bool) -> int:
    """Rows per chunk, see `hfstrat.models`."""
    vocabulary, width = weight.shape
    return rows_per_chunk(vocabulary, width, trainable, weight.device.type == "cpu")


def block_rows(device: torch.device, vocabulary: int, chunk: int) -> int:
    """Rows per block of a chunk; on a GPU the complete chunk."""
    return max(1, min(chunk, BLOCK_BYTES // (4 * vocabulary) if device.type == "cpu" else chunk))


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
        total, needs = torch.zeros((), dtype=wide, device=hidden.device), ctx.needs_input_grad
        for_hidden = torch.empty_like(hidden) if needs[0] else None
        for_weight = torch.zeros_like(weight, dtype=loss_dtype(weight.dtype)) if needs[1] else None
        for_bias = torch.zeros_like(bias, dtype=loss_dtype(bias.dtype)) if bias is not None and needs[2] else None
        head = Head(weight, bias, softcap, scale)
        size = block_rows(weight.device, len(weight), chunk)
        space = torch.empty(size, len(weight), dtype=wide, device=hidden.device)
        # a CPU multiplies float32 by float32 only: the gradient is stored in the precision of its computation
        widened = needs[1] and hidden.is_cpu and dtype != wide
        exact = space.new_empty(padded_rows(len(hidden), chunk, hidden.device), len(weight)) if widened else None
        with without_autocast(hidden.device):
            for start, count, rows, product, own in products(hidden, head, chunk, dtype):
                for part in parts(count, size):
                    logits = logits_of(product[part], head)
                    value, gradient = loss(slice(start + part.start, start + part.stop), logits, space[: len(logits)])
                    total += value
                    _through_softcap_(gradient, logits, softcap, scale)
                    if for_bias is not None:
                        for_bias += gradient.sum(0)
                    product[part] = gradient  # overwrites the logits
                    if exact is not None:
                        exact[part] = gradient
                product[count:] = 0
                if for_hidden is not None:
                    for_hidden[start : start + count] = (product @ own)[:count]
                if for_weight is not None:
                    if exact is not None:
                        exact[count : len(rows)] = 0
                    _add_product_(for_weight, (product if exact is None else exact[: len(rows)]).T, rows)
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


def products(
    hidden: torch.Tensor, head: Head, chunk: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each chunk, in `dtype`: index of the first row, number of rows, rows `[c, H]`, product with the head `[c, V]` (valid
    until the next chunk), weight. Chunks may be padded with rows of zeros."""
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    most = padded_rows(len(hidden), chunk, hidden.device)
    space = torch.empty(most, len(weight), dtype=dtype, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk].to(dtype)
        count = len(rows)
        if padding := padded_rows(count, chunk, hidden.device) - count:
            rows = functional.pad(rows, (0, 0, 0, padding))
        with without_autocast(hidden.device):
            product = torch.mm(rows, weight.T, out=space[: len(rows)])
        if bias is not None:
            product += bias
        yield start, count, rows, product, weight


def padded_rows(rows: int, chunk: int, device: torch.device) -> int:
    """Rows of a product: rounded up on a CPU, at most a chunk.

    On a CPU oneDNN compiles and caches three kernels for each number of rows, and nearly every step has another number: a
    thousand of them used as much memory as a small model.
    """
    if device.type != "cpu":
        return min(chunk, rows)
    step = max(ROW_MULTIPLE, 1 << max(0, (rows - 1).bit_length() - 4))  # the widths of batches, as in data.collate.rounded
    return min(chunk, -(-rows // step) * step)


def logits_of(product: torch.Tensor, head: Head) -> torch.Tensor:
    """The logits of a head's product `[b, V]`, in float32 or wider; modifies a product that already has this precision."""
    logits = product.to(loss_dtype(product.dtype))
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def blocks(hidden: torch.Tensor, head: Head, chunk: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each block: the slice of its rows, and its logits `[b, V]` in float32 or wider (valid until the next block)."""
    chunk = chunk or chunk_rows(head.weight, False)
    for start, count, _, product, _ in products(hidden, head, chunk, compute_dtype(hidden, head.weight)):
        for part in parts(start + count, block_rows(hidden.device, len(head.weight), chunk), start):
            yield part, logits_of(product[part.start - start : part.stop - start], head)


def parts(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Slices of `size` rows from `start` to `stop`; the last one may be shorter."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _through_softcap_(gradient: torch.Tensor, logits: torch.Tensor, softcap: float | None, scale: float) -> None:
    """Turn the gradient of the final logits into that of the head's product, in place; overwrites `logits`."""
    if softcap is not None:
        gradient.mul_(logits.div_(softcap).square_().neg_().add_(1.0))  # tanh' = 1 - tanh^2
    if scale != 1.0:
        gradient *= scale


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, without rounding the product to 16 bits first."""
    if total.is_cuda and left.dtype.itemsize == 2 and total.dtype == torch.float32 and HAS_MIXED_PRODUCT:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The precision of a linear layer: that of autocast, except for float64."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def without_autocast(device: torch.device) -> Any:
    """A context without autocast, which would round the float32 sums."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
