"""The load-balancing loss of mixture-of-experts models (Switch Transformer, arXiv 2101.03961), as transformers computes it.

transformers adds it inside the model's own forward, which our loss over hidden states does not run. It is added where TRL adds
it: in training, where the configuration has `output_router_logits` and a coefficient other than 0. Without it a few experts
take over.

It is not linear in the tokens of a micro-batch, so unlike every other loss it depends on how a batch is split. Each micro-batch
counts by its share of the supervised tokens.
"""

from __future__ import annotations

import sys
from typing import Any, Self

import torch

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # the second is JetMoe's


def coefficient(model: Any) -> float:
    """The factor of the load-balancing loss; 0 for a model without routers, or whose configuration turns it off."""
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return 0.0
    given = (getattr(config, name, None) for name in COEFFICIENTS)
    return float(next((value for value in given if value is not None), 0.0))


class Routing:
    """While this context is active, calls of the model's body in which gradients flow record what its routers computed."""

    def __init__(self, model: Any) -> None:
        self.model, self.logits, self.mask = model, None, None
        self.factor = coefficient(model) if model.training else 0.0

    def __enter__(self) -> Self:
        body = self.model.base_model
        self.hooks = [
            body.register_forward_pre_hook(self._request, with_kwargs=True),
            body.register_forward_hook(self._record, with_kwargs=True),
        ] if self.factor else []  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _request(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, kwargs | {"output_router_logits": True}) if torch.is_grad_enabled() else None

    def _record(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self.logits, self.mask = getattr(output, "router_logits", None), kwargs.get("attention_mask")

    def loss(self) -> torch.Tensor | float:
        """The load-balancing loss times its coefficient; 0 where no gradient could reach a router."""
        if not self.logits or not any(layer.requires_grad for layer in self.logits if layer is not None):
            return 0.0
        return self.factor * balance_loss(self.model, self.logits, self.mask)


def balance_loss(model: Any, router_logits: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The loss by the function of the model's own family. Raises AttributeError where it has none of that name."""
    family: Any = sys.modules[type(model).__module__]
    loss: torch.Tensor = family.load_balancing_loss_func(router_logits, model.num_experts, model.num_experts_per_tok, mask)
    return loss


@torch.no_grad()
def differs(model: Any, ids: torch.Tensor) -> str | None:
    """Why the loss of these token ids is not that of the model's own forward; None if it is, or if there is none."""
    if not coefficient(model):
        return None
    try:
        body = model.base_model(input_ids=ids, use_cache=False, return_dict=True, output_router_logits=True)
        ours = balance_loss(model, body.router_logits, None)
        theirs = type(model).forward(model, input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
        return f"its routers cannot be read ({type(error).__name__}: {error})"
    if torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        return None
    return f"its load-balancing loss is computed in another way (difference {abs(float(ours - theirs)):.2g})"
