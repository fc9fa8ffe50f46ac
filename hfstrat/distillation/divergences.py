"""How far a student's distribution is from its teacher's, per row, with the gradient by the student's logits.

Each function takes the student's and the teacher's log-probabilities `[c, V]` (natural logarithm, float32 or wider), uses
up their memory, and gives the divergence of each row (`[c]`, nats) and its gradient by the logits that the student's
log-probabilities were made of (`[c, V]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Divergence = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student): the student covers all that the teacher may say (Hinton et al. 2015, arXiv 1503.02531)."""
    chances = teacher.exp()
    values = teacher.sub_(student).mul_(chances).sum(-1)
    return values, student.exp_().sub_(chances)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher): the student says only what the teacher may say (MiniLLM, arXiv 2306.08543)."""
    apart = torch.sub(student, teacher, out=teacher)
    chances = student.exp_()
    values = (chances * apart).sum(-1)
    return values, chances.mul_(apart.sub_(values[:, None]))


def jsd(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon: the mean of both divergences from the even mixture; at most log 2."""
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
    slope = ratio.exp_().mul_(skew - 1.0)  # of the divergence by the student's probabilities
    chances = student.exp_()
    mean = (chances * slope).sum(-1, keepdim=True)
    return values, chances.mul_(slope.sub_(mean))


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "skew_kl": skew_kl}


def sampled_kl(
    student: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward KL estimated from tokens drawn from the teacher: value and gradient are unbiased (RS-KD, arXiv 2503.16870).

    Args:
        ids: `[c, S]`, int64, the tokens drawn; one may stand several times.
        weights: `[c, S]`, how often each was drawn as a share of all draws.
        entropy: `[c]`, of the whole teacher distribution, nats: what the cross-entropy is above the divergence.
    """
    values = -(weights * student.gather(1, ids)).sum(-1) - entropy
    return values, student.exp_().scatter_add_(1, ids, -weights)


def top_k_kl(student: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward KL over the teacher's k likeliest tokens and one event "any other", so that the tail's mass is kept.

    A lower bound of the whole divergence. The tail is left as the student has it, only its mass is taught.

    Args:
        ids: `[c, K]`, int64, distinct.
        logprobs: `[c, K]`, of the whole teacher distribution, not renormalised.
    """
    tiny = torch.finfo(student.dtype).tiny
    chances, own = logprobs.exp(), student.gather(1, ids)
    rest = (1 - chances.sum(-1)).clamp(min=0)
    own_rest = (1 - own.exp().sum(-1)).clamp(min=torch.finfo(student.dtype).eps)
    values = (chances * (logprobs - own)).sum(-1) + rest * (rest.clamp(min=tiny).log() - own_rest.log())
    gradient = student.exp_()
    inside = own.exp() - chances
    return values, gradient.mul_((1 - rest / own_rest)[:, None]).scatter_(1, ids, inside)
