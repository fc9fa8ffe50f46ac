"""The loss of preferences in the model's forward: no logits of a batch, and one more pass through the head than a sum of losses.

The loss of a pair is a function of the summed log-likelihoods of its answers, so its gradient with respect to each token's is
known only when all of them are. The head runs twice: without gradients for the log-likelihoods, then, weighted by the loss's
derivatives, with gradients (`chunked_loss.weighted_head_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from hfstrat.models import fused_loss
from hfstrat.models.chunked_loss import Head, head_scores, weighted_head_loss
from hfstrat.models.fused_loss import HeadLossOutput, LossCall, call_with_weight, is_plain, last_hidden, logits_of_module
from hfstrat.objectives.preference import losses
from hfstrat.objectives.preference.collate import OF_THE_LOSS, REFERENCE
from hfstrat.objectives.preference.losses import Answers
from hfstrat.recipe.objectives import Dpo, Orpo, Simpo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = ("loss", "items", "right", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps")
COLUMNS += ("chosen_tokens", "rejected_tokens", "nll", "nll_tokens", "top_1")
"""What is measured of each pair. `items` is 1; `right` is whether the chosen answer has the higher reward, a half if both are
equal, as at the start; `nll` is the cross-entropy of the chosen sequence, summed over `nll_tokens`, of which the model predicts
`top_1`."""

Tensors = dict[str, torch.Tensor]


@dataclass
class PreferenceOutput(HeadLossOutput):
    """The output of the bound forward, without gradients but in `total`: the `COLUMNS` of each row, `[P, 12]`, and the summed
    log-likelihoods of its answers, `[P, 2]`."""

    pairs: torch.Tensor | None = None
    logps: torch.Tensor | None = None


class Found(NamedTuple):
    """A batch: its summed loss, with gradients, the `COLUMNS`, and the log-likelihoods of the answers."""

    total: torch.Tensor
    pairs: torch.Tensor
    logps: torch.Tensor


class PreferenceLoss:
    """The loss of a preference objective (a `fused_loss.Objective`); batches without pairs have the cross-entropy.

    Args:
        section: of the recipe.
    """

    def __init__(self, section: Dpo | Orpo | Simpo) -> None:
        self.section = section

    def __call__(self, model: PreTrainedModel, call: LossCall) -> HeadLossOutput:
        given = {name: call.kwargs.pop(name) for name in OF_THE_LOSS if name in call.kwargs}
        if "pair_sequence" not in given:
            return fused_loss.cross_entropy(model, call)
        layer, targets = model.get_output_embeddings(), call.targets
        hidden = last_hidden(model, call.args, call.kwargs, call.rows)
        if not is_plain(layer):  # as one with an adapter: logits are materialized
            logits = logits_of_module(layer, hidden, call)
            nll, correct = functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
            return _output(self.of_tokens(nll, correct, given), nll, correct)

        def compute(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> PreferenceOutput:
            head = Head(weight, bias, call.softcap, call.scale)
            nll, correct = head_scores(rows, head, targets)
            if not torch.is_grad_enabled():
                return _output(self.of_tokens(nll, correct, given), nll, correct)
            leaf = nll.requires_grad_()
            found = self.of_tokens(leaf, correct, given)
            (derivatives,) = torch.autograd.grad(found.total, leaf)
            weighted = weighted_head_loss(rows, head, targets, derivatives)
            return _output(found._replace(total=found.total.detach() + (weighted - weighted.detach())), nll, correct)

        output: PreferenceOutput = call_with_weight(layer, hidden, compute)
        return output

    def of_tokens(self, nll: torch.Tensor, correct: torch.Tensor, given: Tensors) -> Found:
        """The loss and the measurements of a batch.

        Args:
            nll: of each position with loss, `[n]`, with gradients.
            correct: whether the target is the top-1 prediction, `[n]`.
            given: the keywords `OF_THE_LOSS` of the batch.
        """
        tokens, answer = given["pair_tokens"], given.get("pair_answer")
        of_answers = nll if answer is None else nll * answer
        columns = torch.stack([of_answers, nll, torch.ones_like(nll), correct.to(nll.dtype)], dim=1)
        sums = torch.zeros(tokens.numel(), 4, dtype=nll.dtype, device=nll.device).index_add(0, given["pair_sequence"], columns)
        logps, (cross, cross_tokens, top) = -sums[:, 0].view(-1, 2), sums[::2, 1:].unbind(1)
        answers = Answers(logps, tokens.to(logps.dtype), given.get(REFERENCE))
        found = self._losses(answers)
        total, each = found.losses.sum(), found.losses.detach()
        if isinstance(self.section, Orpo):
            # the mean over pairs plus the mean over chosen tokens, both over the complete step
            share = given["pair_share"] if "pair_share" in given else len(each) / cross_tokens.sum()
            total, each = total + cross.sum() * share, each + cross.detach() / cross_tokens.clamp(min=1)
        chosen, rejected = found.rewards.unbind(1)
        right = (chosen > rejected) + 0.5 * (chosen == rejected)
        measured = [each, torch.ones_like(each), right, chosen, rejected, *logps.unbind(1), *answers.tokens.unbind(1)]
        pairs = torch.stack([one.detach().to(nll.dtype) for one in (*measured, cross, cross_tokens, top)], dim=1)
        return Found(total, pairs, logps.detach())

    def _losses(self, answers: Answers) -> losses.Losses:
        if isinstance(self.section, Orpo):
            return losses.odds_ratio(self.section, answers)
        if isinstance(self.section, Simpo):
            return losses.simpo(self.section, answers)
        if answers.reference is None:  # this model is the reference
            answers = answers._replace(reference=answers.logps.detach())
        return losses.dpo(self.section, answers)


def _output(found: Found, nll: torch.Tensor, correct: torch.Tensor) -> PreferenceOutput:
    return PreferenceOutput(
        total=found.total, nll=nll.detach(), correct=correct, count=len(found.pairs), pairs=found.pairs, logps=found.logps
    )
