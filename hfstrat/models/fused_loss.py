"""A `forward` bound to one model instance: body, supervised positions, loss, without the logits of all positions.

The loss must be computed inside the model's forward, where FSDP has gathered the weights and DDP and autocast are active.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.utils import ModelOutput

from hfstrat.errors import first_line
from hfstrat.models import router_loss
from hfstrat.models.chunked_loss import Head, Kernel, head_loss, head_scores
from hfstrat.models.router_loss import Routing

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEAD_ARGUMENTS = ("labels", "logits_to_keep", "return_dict", "use_cache")  # that the body does not take
PROBE_SHAPE = (2, 9)
TOLERANCE = {4: 1e-3, 2: 2e-2}  # relative to the largest logit, by the bytes of a weight: 16-bit soft-capping is rounded


@dataclass
class HeadLossOutput(ModelOutput):  # type: ignore[misc]
    """The output of the bound forward.

    `total` is the summed loss (nats) and `loss` is `total` divided by the number of supervised tokens, or of `count` where the
    objective counts something else. Outside training there
    are also, per supervised position, `nll` (`[n]`, nats) and `correct` (`[n]`, bool: the target is the top-1 prediction), and
    for a student with a teacher `kl` (`[n]`, nats).
    """

    loss: torch.Tensor | None = None
    total: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    count: int | None = None


class LossCall(NamedTuple):
    """A call of the bound forward: arguments of the body, flat indices and targets of the supervised positions (`[n]`), and
    the scale and soft-capping of the logits."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: torch.Tensor
    targets: torch.Tensor
    scale: float
    softcap: float | None


Objective = Callable[["PreTrainedModel", LossCall], HeadLossOutput]
"""From the model and a call to an output without `loss`. It removes its own keywords from the arguments."""


def bind_head_loss(model: PreTrainedModel, objective: Objective | None = None) -> str | None:
    """Bind the forward, and check on a random batch that its loss equals that of the original forward.

    Called with `loss_rows` (`[n]`, int64, flat indices into B*T of the supervised positions) and `targets` (`[n]`) the model
    then returns a `HeadLossOutput`; other calls are unchanged. To be bound before PEFT, Trainer or Accelerate wrap the model,
    and removed by `unbind_head_loss`.

    Args:
        objective: the loss to minimize; by default the cross-entropy. Its `nll` is compared with the original model's.

    Returns:
        None, or the reason why it cannot be bound to this model.
    """
    if reason := _unsupported(model):
        return reason
    reasons, config = [], model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    for scale in _scales(config):
        model.forward = MethodType(_make_forward(type(model), scale, softcap, objective or cross_entropy), model)
        reasons.append(_differs(model))
        if reasons[-1] is None:
            return None
    unbind_head_loss(model)
    return reasons[0]


def is_bound(model: Any) -> bool:
    """Whether the forward of this model itself (not of one inside it) was replaced on the instance."""
    return "forward" in vars(model)


def unbind_head_loss(model: nn.Module) -> None:
    """Restore the forward of the model's class; does nothing if none was bound."""
    vars(model).pop("forward", None)


def _unsupported(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    if is_bound(model):
        return "its forward is already replaced"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        return "it has no output embeddings"
    if model.base_model is model:
        return "its body is not a separate module"
    return None


def _scales(config: PretrainedConfig) -> Iterator[float]:
    """Possible factors of the logits: under the same key, Granite divides and HyperCLOVA X multiplies by the value."""
    names = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
    named = [getattr(config, name, None) for name in names]
    given = [float(scale) for scale in named if isinstance(scale, int | float) and scale]
    yield from dict.fromkeys([*given, *(1 / scale for scale in given), 1.0])


def _make_forward(family: type[PreTrainedModel], scale: float, softcap: float | None, objective: Objective) -> Any:
    original = family.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        loss_rows: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if loss_rows is None or targets is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return original(self, *args, **kwargs)
        with Routing(self) as routing:
            output = objective(self, LossCall(args, kwargs, loss_rows, targets, scale, softcap))
        assert output.total is not None
        items = len(targets) if output.count is None else output.count
        output.total = output.total + routing.loss() * items
        count = torch.as_tensor(items if num_items_in_batch is None else num_items_in_batch, device=targets.device)
        output.loss = output.total / count.clamp(min=1)
        return output

    # generate and Trainer read the signature. Not functools.wraps: Accelerate would follow its `__wrapped__` and remove this
    # function together with its own wrapper
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    forward.objective, forward.scale, forward.softcap = objective, scale, softcap  # type: ignore[attr-defined]
    return forward


def objective_of(model: nn.Module) -> Objective | None:
    """The objective that is bound to a model or to a module inside it."""
    bound = (getattr(vars(module).get("forward"), "objective", None) for module in model.modules())
    return next((objective for objective in bound if objective is not None), None)


def cross_entropy(model: PreTrainedModel, call: LossCall, kernel: Kernel = head_loss) -> HeadLossOutput:
    """The cross-entropy of the supervised positions; in evaluation and without gradients also the scores of each."""
    layer, targets = model.get_output_embeddings(), call.targets
    hidden = last_hidden(model, call.args, call.kwargs, call.rows)
    if not is_plain(layer):
        return scores_of_logits(logits_of_module(layer, hidden, call), targets)

    def compute(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, Any, Any]:
        head, with_grad = Head(weight, bias, call.softcap, call.scale), torch.is_grad_enabled()
        nll, correct = (None, None) if model.training and with_grad else head_scores(rows, head, targets)
        if nll is not None and not with_grad:
            return nll.sum(), nll, correct
        loss = kernel if len(targets) else head_loss  # it returns zeros without targets
        return loss(rows, head, targets), nll, correct

    total, nll, correct = call_with_weight(layer, hidden, compute)
    return HeadLossOutput(total=total, nll=nll, correct=correct)


def last_hidden(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The body's last hidden states, the input of the head: `[B * T, H]`, or those at some flat indices."""
    hidden: torch.Tensor = call_body(model, args, kwargs).last_hidden_state.flatten(0, 1)
    return hidden if rows is None else hidden.index_select(0, rows)


def call_body(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], **more: Any) -> Any:
    """The output of the body for the arguments of the model."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in HEAD_ARGUMENTS}
    return model.base_model(*args, **given, **more, use_cache=False, return_dict=True)


def logits_of_module(layer: nn.Module, rows: torch.Tensor, call: LossCall) -> torch.Tensor:
    """The logits `[n, V]` of a head that is not plain, such as one with an adapter, in float32 or wider."""
    logits: torch.Tensor = layer(rows)
    logits = (logits.float() if logits.dtype.itemsize < 4 else logits) * call.scale
    return logits if call.softcap is None else torch.tanh(logits / call.softcap) * call.softcap


def scores_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> HeadLossOutput:
    """The summed cross-entropy of logits `[n, V]`, and the scores of each position."""
    nll = functional.cross_entropy(logits, targets, reduction="none")
    return HeadLossOutput(total=nll.sum(), nll=nll.detach(), correct=logits.argmax(-1) == targets)


def is_plain(head: nn.Module) -> bool:
    """Whether the head is only weight and bias: no adapter, no quantization, no hooks except those of FSDP2 and ZeRO-3."""
    if is_sharded_head(head):
        return type(head).forward is nn.Linear.forward and not is_bound(head)
    return type(head) is nn.Linear and not (is_bound(head) or head._forward_hooks or head._forward_pre_hooks)


def is_sharded_head(head: Any) -> bool:
    """Whether the weight is complete only while the module is called, as under FSDP2 and ZeRO-3."""
    return hasattr(head.weight, "ds_id") or any(kind.__name__ == "FSDPModule" for kind in type(head).__mro__)


def call_with_weight(
    head: Any, rows: torch.Tensor, compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]
) -> Any:
    """The result of `compute(rows, weight, bias)`, inside a call of the head if its weight is sharded."""
    if not is_sharded_head(head):
        return compute(rows, head.weight, head.bias)
    head.forward = lambda rows: compute(rows, head.weight, head.bias)
    try:
        return head(rows)
    finally:
        del head.forward


@torch.no_grad()
def _differs(model: PreTrainedModel) -> str | None:
    """Compare the bound forward's loss with that of the original logits at some positions, in the model's dtype."""
    was_training = model.training
    model.eval()
    try:
        ids, rows, targets = _probe(model)
        ours = model(input_ids=ids, loss_rows=rows, targets=targets).nll
        logits = model(input_ids=ids).logits.flatten(0, 1)[rows]
        if reason := router_loss.differs(model, ids):
            return reason
    except Exception as error:  # an unknown architecture can fail in any way
        return f"its forward cannot be split into body and head ({type(error).__name__}: {first_line(error)})"
    finally:
        model.train(was_training)
    size = TOLERANCE[min(4, logits.dtype.itemsize)]
    logits = logits.to(ours.dtype)
    spread = float((logits - logits.mean(-1, keepdim=True)).abs().max())
    difference = float((ours - functional.cross_entropy(logits, targets, reduction="none")).abs().max())
    if not 0 < spread < float("inf"):
        return "its logits are all equal or not finite, so they cannot be compared"
    if not difference <= size * spread:
        return f"its loss is not computed by its head alone (difference {difference:.2g} nats, largest logit {spread:.2g})"
    return None


def _probe(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids `[2, 9]`, some flat positions and random targets for them; the global random state is not used."""
    device, generator = model.get_input_embeddings().weight.device, torch.Generator().manual_seed(0)
    vocabulary = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, PROBE_SHAPE, generator=generator)
    rows = torch.randperm(ids.numel(), generator=generator)[: ids.numel() // 2].sort().values
    targets = torch.randint(0, vocabulary, rows.shape, generator=generator)
    return ids.to(device), rows.to(device), targets.to(device)
