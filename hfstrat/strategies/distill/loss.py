"""The distillation loss per position: a divergence and cross-entropy in one pass over chunks of logits.

As in `models/chunked_loss.py`, gradients are computed in the forward pass, and no `[n, V]` tensor of either model exists.
The divergences take the student's and the teacher's log-probabilities `[c, V]` (natural logarithm, float32 or wider), overwrite
their memory, and return the divergence of each position (`[c]`, nats) and its gradient with respect to the student's logits
(`[c, V]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from hfstrat.models import MIN_CHUNK_ROWS
from hfstrat.models.chunked_loss import (
    Head,
    RowsLoss,
    block_rows,
    blocks,
    chunk_rows,
    compute_dtype,
    logits_of,
    loss_dtype,
    parts,
    products,
    rows_loss,
)

Divergence = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student): covers all modes of the teacher (Hinton et al. 2015, arXiv 1503.02531)."""
    chances = teacher.exp()
    values = teacher.sub_(student).mul_(chances).sum(-1)
    return values, student.exp_().sub_(chances)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher): seeks modes of the teacher (MiniLLM, arXiv 2306.08543)."""
    apart = torch.sub(student, teacher, out=teacher)
    chances = student.exp_()
    values = (chances * apart).sum(-1)
    return values, chances.mul_(apart.sub_(values[:, None]))


def jsd(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon divergence: the mean of both divergences from the even mixture; at most log 2."""
    middle = torch.logaddexp(student, teacher).sub_(math.log(2))
    from_teacher = (teacher - middle).mul_(teacher.exp_()).sum(-1)
    apart = torch.sub(student, middle, out=middle)
    chances = student.exp_()
    from_student = (chances * apart).sum(-1)
    gradient = chances.mul_(apart.sub_(from_student[:, None])).mul_(0.5)
    return (from_teacher + from_student) / 2, gradient


def skew_kl(student: torch.Tensor, teacher: torch.Tensor, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || skew * teacher + (1 - skew) * student), whose gradient stays bounded (DistiLLM, arXiv 2402.03898)."""
    mixed = torch.logaddexp(teacher + math.log(skew), student + math.log1p(-skew))
    ratio = torch.sub(teacher, mixed, out=mixed)  # log(teacher / mixture)
    values = (ratio * teacher.exp_()).sum(-1)
    slope = ratio.exp_().mul_(skew - 1.0)  # the derivative with respect to the student's probabilities
    chances = student.exp_()
    mean = (chances * slope).sum(-1, keepdim=True)
    return values, chances.mul_(slope.sub_(mean))


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}


def sampled_kl(
    student: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward KL estimated from tokens sampled from the teacher: value and gradient are unbiased (RS-KD, arXiv 2503.16870).

    Args:
        ids: `[c, S]`, int64, the sampled tokens, with duplicates.
        weights: `[c, S]`, the share of each in all samples.
        entropy: `[c]`, of the full teacher distribution, nats: the difference of cross-entropy and divergence.
    """
    values = -(weights * student.gather(1, ids)).sum(-1) - entropy
    return values, student.exp_().scatter_add_(1, ids, -weights)


def top_k_kl(student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward KL over the teacher's k most likely tokens and one event for all others, so that the mass of the tail is kept.

    A lower bound of the full divergence: within the tail the student is not changed.

    Args:
        ids: `[c, K]`, int64, distinct.
        logprobs: `[c, K]`, of the full teacher distribution, not renormalized.
    """
    tiny = torch.finfo(student.dtype).tiny
    chances, own = logprobs.exp(), student.gather(1, ids)
    rest = (1 - chances.sum(-1)).clamp(min=0)
    own_rest = (1 - own.exp().sum(-1)).clamp(min=torch.finfo(student.dtype).eps)
    values = (chances * (logprobs - own)).sum(-1) + rest * (rest.clamp(min=tiny).log() - own_rest.log())
    gradient = student.exp_()
    inside = own.exp() - chances
    return values, gradient.mul_((1 - rest / own_rest)[:, None]).scatter_(1, ids, inside)


BlockDivergence = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From the slice of a block and the student's log-probabilities `[b, W]`, whose memory is overwritten, to the divergence of
each position and its gradient with respect to the logits."""


class Teacher(NamedTuple):
    """Outputs of the teacher for `n` positions, in one of three forms; `width`: tokens that both vocabularies share.

    `hidden` (`[n, H]`) with its `head` is exact. `ids` with `weights` and `entropy` are samples (`sampled_kl`), `ids` with
    `logprobs` its most likely tokens (`top_k_kl`), both at the temperature of the loss.
    """

    width: int
    hidden: torch.Tensor | None = None
    head: Head | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None


class Mix(NamedTuple):
    """The loss of a position is `alpha * T^2 * divergence + (1 - alpha) * cross-entropy`; probabilities at temperature T.

    Hinton's T^2 keeps the scale of the gradient when T changes; it is applied to the value too, so both agree. The
    cross-entropy is over the student's own vocabulary at temperature 1, for every divergence.
    """

    divergence: str = "forward_kl"
    alpha: float = 0.5
    temperature: float = 1.0
    skew: float = 0.1


def distill_loss(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, teacher: Teacher, mix: Mix, chunk: int | None = None
) -> torch.Tensor:
    """The mixed loss (nats) summed over positions: a scalar in float32 or wider. Gradients go to `hidden` and `head`.

    Args:
        hidden: `[n, H]`, the student's supervised positions; `head` is the student's.
        targets: `[n]`, int64.
        chunk: positions at a time; by default so many that the logits fit the cache.
    """
    chunk = chunk or chunk_rows(head.weight, head.weight.requires_grad)
    apart = divergence_from(teacher, mix, compute_dtype(hidden, head.weight), chunk)
    return rows_loss(hidden, head, row_loss(targets, apart, teacher.width, mix), chunk)


def distill_loss_of_logits(logits: torch.Tensor, targets: torch.Tensor, teacher: Teacher, mix: Mix) -> torch.Tensor:
    """The same from logits `[n, V]` of a head that is not a plain linear layer; logits and gradient are materialized."""
    size, chunk = _sizes(logits)
    loss = row_loss(targets, divergence_from(teacher, mix, compute_dtype(logits, logits), chunk), teacher.width, mix)
    total: torch.Tensor = _LossOfLogits.apply(logits, loss, size)  # type: ignore[no-untyped-call]
    return total


def _sizes(logits: torch.Tensor) -> tuple[int, int]:
    """The positions per block of logits, and per chunk of the teacher's logits."""
    size = block_rows(logits.device, logits.shape[-1], MIN_CHUNK_ROWS)
    return size, size * (MIN_CHUNK_ROWS // size)


@torch.no_grad()
def distill_scores(
    hidden: torch.Tensor, head: Head, teacher: Teacher, temperature: float = 1.0, chunk: int | None = None
) -> torch.Tensor:
    """KL(teacher || student) per position in nats, `[n]`, at this temperature; without a gradient."""
    chunk = chunk or chunk_rows(head.weight, False)
    apart = divergence_from(teacher, Mix("forward_kl", 1.0, temperature), compute_dtype(hidden, head.weight), chunk)
    return _scores(blocks(hidden, head, chunk), apart, teacher.width, temperature, hidden)


@torch.no_grad()
def distill_scores_of_logits(logits: torch.Tensor, teacher: Teacher, temperature: float = 1.0) -> torch.Tensor:
    """The same from logits `[n, V]`."""
    size, chunk = _sizes(logits)
    apart = divergence_from(teacher, Mix("forward_kl", 1.0, temperature), compute_dtype(logits, logits), chunk)
    return _scores(((part, logits[part]) for part in parts(len(logits), size)), apart, teacher.width, temperature, logits)


def _scores(
    of_blocks: Iterable[tuple[slice, torch.Tensor]], apart: BlockDivergence, width: int, temperature: float, like: torch.Tensor
) -> torch.Tensor:
    found = [apart(part, torch.log_softmax(logits[:, :width] / temperature, -1))[0] for part, logits in of_blocks]
    return torch.cat([like.new_empty(0, dtype=loss_dtype(like.dtype)), *found])


def row_loss(targets: torch.Tensor, apart: BlockDivergence, width: int, mix: Mix) -> RowsLoss:
    """The mixed loss as an argument of `chunked_loss.rows_loss`."""
    alpha, temperature = mix.alpha, mix.temperature

    def loss(part: slice, logits: torch.Tensor, space: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole, wanted = width == logits.shape[-1], targets[part][:, None]
        scaled = logits[:, :width] if temperature == 1.0 else logits[:, :width] / temperature
        student = torch.log_softmax(scaled, -1, out=space if whole else None)
        value, own = torch.zeros((), dtype=logits.dtype, device=logits.device), torch.empty(0)
        if alpha < 1.0:  # if both losses use the same distribution it is computed once
            own = student if whole and temperature == 1.0 else torch.log_softmax(logits, -1)
            value = own.gather(1, wanted).sum() * (alpha - 1)
            own = own.exp() if own is student else own.exp_()
        values, gradient = apart(part, student)
        value += values.sum() * (alpha * temperature**2)
        if alpha * temperature != 1.0:
            gradient *= alpha * temperature  # T^2, and 1/T from the chain rule
        if not whole:  # tokens that only the student has
            space.zero_()[:, :width] = gradient
            gradient = space
        if alpha == 1.0:
            return value, gradient
        gradient.add_(own, alpha=1 - alpha)
        return value, gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, alpha - 1))

    return loss


def divergence_from(teacher: Teacher, mix: Mix, dtype: torch.dtype, chunk: int) -> BlockDivergence:
    """The divergence from the teacher's outputs; its logits are computed in this dtype, `chunk` positions at a time."""
    if teacher.hidden is not None:
        return _exact(teacher, mix, dtype, chunk)
    ids = teacher.ids
    assert ids is not None
    if mix.divergence != "forward_kl":
        raise ValueError(f"{mix.divergence} needs the full distribution of the teacher, not some of its tokens")
    if teacher.logprobs is not None:
        logprobs = teacher.logprobs
        return lambda part, student: top_k_kl(student, ids[part], logprobs[part].to(student.dtype))
    weights, entropy = teacher.weights, teacher.entropy
    assert weights is not None
    assert entropy is not None
    return lambda part, student: sampled_kl(
        student, ids[part], weights[part].to(student.dtype), entropy[part].to(student.dtype)
    )


def _exact(teacher: Teacher, mix: Mix, dtype: torch.dtype, chunk: int) -> BlockDivergence:
    assert teacher.hidden is not None
    assert teacher.head is not None
    hidden, head, width = teacher.hidden, teacher.head, teacher.width
    apart = DIVERGENCES[mix.divergence]
    options = {"skew": mix.skew} if mix.divergence == "skew_kl" else {}
    head = head.map(lambda one: one[:width])
    chunks, first, count, product = products(hidden, head, chunk, dtype), 0, 0, hidden.new_empty(0)

    def of_block(part: slice, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal first, count, product
        while part.stop > first + count:  # blocks come in order, and none spans two chunks
            first, count, _, product, _ = next(chunks)
        logits = logits_of(product[part.start - first : part.stop - first], head)
        if mix.temperature != 1.0:
            logits /= mix.temperature
        return apart(student, torch.log_softmax(logits, -1), **options)

    return of_block


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, loss: RowsLoss, size: int) -> torch.Tensor:
        wide = loss_dtype(logits.dtype)
        total, gradient = torch.zeros((), dtype=wide, device=logits.device), torch.empty_like(logits)
        for part in parts(len(logits), size):
            rows = logits[part].to(wide)
            value, gradient[part] = loss(part, rows, torch.empty_like(rows))
            total += value
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_output, None, None
