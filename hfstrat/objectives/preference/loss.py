"""The loss of preferences in the model's forward: no logits of a batch, and one more pass through the head.

The loss of a pair is a function of the summed log-likelihoods of its answers, so its gradient with respect to each token's is
known only when all of them are. The head runs twice: without gradients for the log-likelihoods, then, weighted by the loss's
derivatives, with gradients (`chunked_loss.weighted_head_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from hfstrat.data.preference_rows import DESIRABLE
from hfstrat.models import fused_loss
from hfstrat.models.chunked_loss import Head, head_scores, weighted_head_loss
from hfstrat.models.fused_loss import HeadLossOutput, LossCall, call_with_weight, is_plain, last_hidden, logits_of_module
from hfstrat.objectives.preference import losses
from hfstrat.objectives.preference.collate import OF_THE_LOSS, OTHERS, REFERENCE
from hfstrat.objectives.preference.losses import Answers
from hfstrat.recipe.objectives import Dpo, Kto, Orpo, Simpo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLUMNS = (
    *("loss", "items", "right", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps"),
    *("chosen_tokens", "rejected_tokens", "nll", "nll_tokens", "top_1"),
)
"""What is measured of each pair. `items` is 1; `right` is whether the chosen answer has the higher reward, a half if both are
equal, as at the start; `nll` is the cross-entropy of the chosen sequence, summed over `nll_tokens`, of which the model predicts
`top_1`."""
LABELED = ("loss", "items", "chosen", "rejected", "chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps", "kl")
"""What is measured of each answer with a label: `chosen` is 1 of a desirable one, `rejected` of another; `kl` is the divergence
of the step."""

Tensors = dict[str, torch.Tensor]


@dataclass
class PreferenceOutput(HeadLossOutput):
    """The output of the bound forward, without gradients but in `total`: the `COLUMNS` of each pair, `[P, 12]`, or `LABELED` of
    each answer, and the summed log-likelihoods of the answers, `[P, 2]` or `[P]`."""

    pairs: torch.Tensor | None = None
    logps: torch.Tensor | None = None


class Found(NamedTuple):
    """A batch: its summed loss, with gradients, the columns of each row, and the log-likelihoods of the answers."""

    total: torch.Tensor
    pairs: torch.Tensor
    logps: torch.Tensor


class PreferenceLoss:
    """The loss of a preference objective (a `fused_loss.Objective`); batches without pairs have the cross-entropy.

    Args:
        section: of the recipe.
    """

    def __init__(self, section: Dpo | Kto | Orpo | Simpo) -> None:
        self.section = section

    def __call__(self, model: PreTrainedModel, call: LossCall) -> HeadLossOutput:
        given = {name: call.kwargs.pop(name) for name in OF_THE_LOSS if name in call.kwargs}
        for name in [name for name in call.kwargs if name.startswith(OTHERS)]:  # a batch of their own
            del call.kwargs[name]
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
        sums = torch.zeros(len(tokens), 4, dtype=nll.dtype, device=nll.device).index_add(0, given["pair_sequence"], columns)
        answers = Answers(-sums[:, 0], tokens.to(nll.dtype), given.get(REFERENCE))
        if isinstance(self.section, Kto):
            return self._labeled(self.section, answers, given)
        return self._paired(answers, sums[::2, 1:], given)

    def _paired(self, single: Answers, chosen: torch.Tensor, given: Tensors) -> Found:
        """Of pairs; `chosen` are the cross-entropy, the tokens and the right ones of the chosen sequences, `[P, 3]`."""
        answers = Answers(single.logps.view(-1, 2), single.tokens.view(-1, 2), single.reference)
        found, (cross, cross_tokens, top) = self._losses(answers), chosen.unbind(1)
        total, each = found.losses.sum(), found.losses.detach()
        if isinstance(self.section, Orpo):
            # the mean over pairs plus the mean over chosen tokens, both over the complete step
            share = given["pair_share"] if "pair_share" in given else len(each) / cross_tokens.sum()
            total, each = total + cross.sum() * share, each + cross.detach() / cross_tokens.clamp(min=1)
        better, worse = found.rewards.unbind(1)
        right = (better > worse) + 0.5 * (better == worse)
        measured = [each, torch.ones_like(each), right, better, worse, *answers.logps.unbind(1), *answers.tokens.unbind(1)]
        rows = torch.stack([one.detach().to(each.dtype) for one in (*measured, cross, cross_tokens, top)], dim=1)
        return Found(total, rows, answers.logps.detach())

    def _losses(self, answers: Answers) -> losses.Losses:
        if isinstance(self.section, Orpo):
            return losses.odds_ratio(self.section, answers)
        if isinstance(self.section, Simpo):
            return losses.simpo(self.section, answers)
        assert isinstance(self.section, Dpo)
        return losses.dpo(self.section, with_own_reference(answers))

    def _labeled(self, section: Kto, answers: Answers, given: Tensors) -> Found:
        """Of answers with labels; the divergence is that of the complete step, which the Trainer adds to the batch."""
        reference = None if answers.reference is None else answers.reference[:, 0]
        answers = with_own_reference(answers._replace(reference=reference))
        if DESIRABLE not in given:  # the second sequences, of which only the log-likelihoods matter
            return Found(answers.logps.sum(), answers.logps.detach()[:, None], answers.logps.detach())
        divergence = given["pair_divergence"] if "pair_divergence" in given else answers.logps.new_zeros(())
        found = losses.kto(section, answers, given[DESIRABLE], divergence)
        each = found.losses.detach()
        good, kl = given[DESIRABLE].to(each.dtype), torch.ones_like(each) * divergence
        measured = [values * mask for values in (found.rewards, answers.logps) for mask in (good, 1 - good)]
        rows = torch.stack([each, torch.ones_like(each), good, 1 - good, *(one.detach() for one in measured), kl], dim=1)
        return Found(found.losses.sum(), rows, answers.logps.detach())


def with_own_reference(answers: Answers) -> Answers:
    """The answers with themselves as the reference if there is none: then this model is the reference."""
    return answers if answers.reference is not None else answers._replace(reference=answers.logps.detach())


def _output(found: Found, nll: torch.Tensor, correct: torch.Tensor) -> PreferenceOutput:
    return PreferenceOutput(
        total=found.total, nll=nll.detach(), correct=correct, count=len(found.pairs), pairs=found.pairs, logps=found.logps
    )
