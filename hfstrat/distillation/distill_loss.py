"""What a student learns from a teacher, row by row: divergence and cross-entropy in one pass over chunks of logits.

As in `head_loss`, gradients are computed in the forward pass and no `[n, V]` tensor ever exists, of neither model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from hfstrat.distillation.divergences import DIVERGENCES, sampled_kl, top_k_kl
from hfstrat.head_loss import (
    CHUNK_ROWS,
    Head,
    RowsLoss,
    chunks,
    compute_dtype,
    loss_dtype,
    project,
    rows_loss,
    without_autocast,
)

Apart = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a chunk's place and the student's log-probabilities `[c, W]`, whose memory is used up: the divergence of each row
and its gradient by what these are the log-softmax of."""


class Teacher(NamedTuple):
    """What the teacher says about `n` rows, in one of three forms; `width`: how many tokens both vocabularies share.

    `hidden` (`[n, H]`) with its `head` is exact. `ids` with `weights` and `entropy` are draws (`divergences.sampled_kl`),
    `ids` with `logprobs` its likeliest tokens (`divergences.top_k_kl`), both made at the temperature of the loss.
    """

    width: int
    hidden: torch.Tensor | None = None
    head: Head | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None


class Mix(NamedTuple):
    """The loss of a row is `alpha * T^2 * divergence + (1 - alpha) * cross-entropy`; probabilities at temperature T.

    Hinton's T^2 keeps the gradient's size when T changes; it stands on the value too, so that both belong together.
    The cross-entropy is that of the student's own vocabulary at temperature 1, whatever the divergence is.
    """

    divergence: str = "forward_kl"
    alpha: float = 0.5
    temperature: float = 1.0
    skew: float = 0.1


def distill_loss(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, teacher: Teacher, mix: Mix, chunk: int | None = None
) -> torch.Tensor:
    """The mixed loss (nats) summed over rows: a scalar in float32 or wider. Gradients go to `hidden` and `head`.

    Args:
        hidden: `[n, H]`, the student's rows that carry loss; `head` is the student's.
        targets: `[n]`, int64.
        chunk: rows at a time; by default as many as keep the logits in cache.
    """
    loss = row_loss(targets, apart_of(teacher, mix, hidden, head), teacher.width, mix)
    return rows_loss(hidden, head, loss, chunk)


def distill_loss_of_logits(logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, mix: Mix) -> torch.Tensor:
    """The same from logits `[n, V]` that a head of its own kind has made; these exist, and their gradient."""
    stand_in = Head(logits)  # decides chunks and dtypes only
    loss = row_loss(targets, apart_of(teacher, mix, logits, stand_in), teacher.width, mix)
    total: torch.Tensor = _OfLogits.apply(logits, loss)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def distill_scores(
    hidden: torch.Tensor, head: Head, teacher: Teacher, temperature: float = 1.0, chunk: int | None = None
) -> torch.Tensor:
    """Per row KL(teacher || student) in nats, `[n]`, at this temperature; without a gradient."""
    apart = apart_of(teacher, Mix("forward_kl", 1.0, temperature), hidden, head)
    found = [
        apart(part, torch.log_softmax(logits[:, : teacher.width] / temperature, -1))[0]
        for part, _, logits in chunks(hidden, head, chunk)
    ]
    empty = torch.empty(0, dtype=loss_dtype(head.weight.dtype), device=hidden.device)
    return torch.cat([empty, *found])


@torch.no_grad()
def distill_scores_of_logits(logits: torch.Tensor, teacher: Teacher, temperature: float = 1.0) -> torch.Tensor:
    """The same from logits `[n, V]`."""
    apart = apart_of(teacher, Mix("forward_kl", 1.0, temperature), logits, Head(logits))
    scaled = logits[:, : teacher.width] / temperature
    parts = (slice(start, start + CHUNK_ROWS) for start in range(0, len(logits), CHUNK_ROWS))
    return torch.cat([logits.new_empty(0), *(apart(part, torch.log_softmax(scaled[part], -1))[0] for part in parts)])


def row_loss(targets: torch.Tensor, apart: Apart, width: int, mix: Mix) -> RowsLoss:
    """The mixed loss as `head_loss.rows_loss` takes it."""
    alpha, temperature = mix.alpha, mix.temperature

    def loss(part: slice, logits: torch.Tensor, space: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole, wanted = width == logits.shape[-1], targets[part][:, None]
        scaled = logits[:, :width] if temperature == 1.0 else logits[:, :width] / temperature
        student = torch.log_softmax(scaled, -1, out=space if whole else None)
        value, own = torch.zeros((), dtype=logits.dtype, device=logits.device), torch.empty(0)
        if alpha < 1.0:  # where both losses have one distribution it is made once
            own = student if whole and temperature == 1.0 else torch.log_softmax(logits, -1)
            value = own.gather(1, wanted).sum() * (alpha - 1)
            own = own.exp() if own is student else own.exp_()
        values, gradient = apart(part, student)
        value += values.sum() * (alpha * temperature**2)
        gradient *= alpha * temperature  # T^2, and 1/T from the chain rule
        if not whole:  # tokens that only the student has
            space.zero_()[:, :width] = gradient
            gradient = space
        if alpha == 1.0:
            return value, gradient
        gradient.add_(own, alpha=1 - alpha)
        return value, gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, alpha - 1))

    return loss


def apart_of(teacher: Teacher, mix: Mix, hidden: torch.Tensor, head: Head) -> Apart:
    """The divergence from what the teacher says; `hidden` and `head` are the student's."""
    if teacher.hidden is not None:
        return _exact(teacher, mix, compute_dtype(hidden, head.weight))
    ids = teacher.ids
    assert ids is not None
    if mix.divergence != "forward_kl":
        raise ValueError(f"{mix.divergence} needs the whole distribution of the teacher, not some of its tokens")
    if teacher.logprobs is not None:
        logprobs = teacher.logprobs
        return lambda part, student: top_k_kl(student, ids[part], logprobs[part].to(student.dtype))
    weights, entropy = teacher.weights, teacher.entropy
    assert weights is not None
    assert entropy is not None
    return lambda part, student: sampled_kl(
        student, ids[part], weights[part].to(student.dtype), entropy[part].to(student.dtype)
    )


def _exact(teacher: Teacher, mix: Mix, dtype: torch.dtype) -> Apart:
    assert teacher.hidden is not None
    assert teacher.head is not None
    hidden, head, width = teacher.hidden, teacher.head, teacher.width
    apart = DIVERGENCES[mix.divergence]
    options = {"skew": mix.skew} if mix.divergence == "skew_kl" else {}
    bias = None if head.bias is None else head.bias[:width].to(dtype)
    head = head._replace(weight=head.weight[:width].to(dtype), bias=bias)
    made = torch.empty(0, dtype=dtype, device=hidden.device)
    said = torch.empty(0, dtype=loss_dtype(dtype), device=hidden.device)

    def of_chunk(part: slice, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal made, said
        rows = hidden[part].to(dtype)
        if made.numel() < student.numel():  # fresh pages cost time
            made, said = made.new_empty(student.shape), said.new_empty(student.shape)
        with without_autocast(hidden.device):
            logits = project(rows, head, made[: len(rows)])
            if mix.temperature != 1.0:
                logits /= mix.temperature
            return apart(student, torch.log_softmax(logits, -1, out=said[: len(rows)]), **options)

    return of_chunk


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, loss: RowsLoss) -> torch.Tensor:
        wide = loss_dtype(logits.dtype)
        total, gradient = torch.zeros((), dtype=wide, device=logits.device), torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            rows = logits[part].to(wide)
            value, gradient[part] = loss(part, rows, torch.empty_like(rows))
            total += value
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_output, None
