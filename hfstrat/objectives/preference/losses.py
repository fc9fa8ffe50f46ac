"""The losses of preferences, as functions of the log-probabilities of the answers; equal to those of TRL 1.16.

TRL computes them inside its trainers, together with their batches and metrics, so they cannot be called alone:
`tests/objectives/test_trl.py` compares these with its trainers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from hfstrat.recipe.objectives import Dpo, Kto, Orpo, Simpo


class Answers(NamedTuple):
    """The answers of a batch: of pairs `[P, 2]` each, chosen and rejected; of single answers `[S]`.

    logps: summed log-probabilities of their tokens (nats), with gradients.
    tokens: their number.
    reference: `logps` of the initial model; None for objectives without one.
    """

    logps: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor | None = None

    @property
    def ratios(self) -> torch.Tensor:
        """The logarithms of the ratios to the reference."""
        assert self.reference is not None
        return self.logps - self.reference


class Losses(NamedTuple):
    """`losses` `[P]` or `[S]` with gradients, `rewards` of the shape of `logps` without."""

    losses: torch.Tensor
    rewards: torch.Tensor


def dpo(section: Dpo, answers: Answers) -> Losses:
    """The loss of each pair by `loss_type`; the paper of each is named in TRL's documentation of DPOConfig."""
    beta, smoothing, kind = section.beta, section.label_smoothing, section.loss_type
    chosen, rejected = answers.ratios.unbind(-1)
    margin = beta * (chosen - rejected)
    if kind == "sigmoid":
        losses = -logsigmoid(margin)
    elif kind == "hinge":
        losses = torch.relu(1 - margin)
    elif kind == "ipo":
        means = answers.ratios / answers.tokens.clamp(min=1)
        losses = (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2
    elif kind == "sigmoid_norm":
        means = answers.ratios / answers.tokens.clamp(min=1)
        losses = -logsigmoid(beta * (means[:, 0] - means[:, 1]))
    elif kind == "exo_pair":
        wins, loses = logsigmoid(margin), logsigmoid(-margin)
        target = torch.tensor([1 - smoothing, smoothing], dtype=margin.dtype, device=margin.device).log()
        losses = wins.exp() * (wins - target[0]) + loses.exp() * (loses - target[1])
    elif kind == "nca_pair":
        losses = -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)
    elif kind == "robust":
        losses = (-(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)) / (1 - 2 * smoothing)
    elif kind == "bco_pair":
        losses = -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)
    elif kind == "sppo_hard":
        losses = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    elif kind == "apo_zero":
        losses = 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    elif kind == "apo_down":
        losses = torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(margin)
    else:
        modulation = torch.sigmoid(margin / section.discopop_tau)
        losses = -logsigmoid(margin) * (1 - modulation) + torch.exp(-margin) * modulation
    return Losses(losses, beta * answers.ratios.detach())


def simpo(section: Simpo, answers: Answers) -> Losses:
    """Equation 6 of arXiv 2405.14734."""
    means = answers.logps / answers.tokens.clamp(min=1)
    losses = -logsigmoid(section.beta * (means[:, 0] - means[:, 1]) - section.simpo_gamma)
    return Losses(losses, section.beta * means.detach())


def odds_ratio(section: Orpo, answers: Answers) -> Losses:
    """The odds ratio of ORPO, equations 4 and 7 of arXiv 2403.07691, without its cross-entropy."""
    means = (answers.logps / answers.tokens.clamp(min=1)).float()
    odds = means - log1mexp(means)
    losses = -section.beta * logsigmoid(odds[:, 0] - odds[:, 1])
    return Losses(losses, section.beta * means.detach())


def log1mexp(logps: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, precise near 0 and far from it (Mächler 2012, Rmpfr)."""
    limit = torch.finfo(logps.dtype).eps
    logps = logps.clamp(max=-limit)
    return torch.where(logps > -0.6931471805599453, torch.log(-torch.expm1(logps)), torch.log1p(-torch.exp(logps)))


def kto(section: Kto, answers: Answers, desirable: torch.Tensor, divergence: torch.Tensor) -> Losses:
    """The loss of each answer, equation 7 of arXiv 2402.01306.

    Args:
        desirable: `[S]`, bool.
        divergence: the estimated divergence from the reference (nats), at least 0, without gradients; a scalar.
    """
    ratios, beta = answers.ratios, section.beta
    if section.loss_type == "kto":
        good, bad = 1 - torch.sigmoid(beta * (ratios - divergence)), 1 - torch.sigmoid(beta * (divergence - ratios))
    else:
        good, bad = 1 - torch.sigmoid(beta * ratios), torch.sigmoid(beta * ratios)
    losses = torch.where(desirable, section.desirable_weight * good, section.undesirable_weight * bad)
    return Losses(losses, beta * ratios.detach())
