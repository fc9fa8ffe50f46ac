"""Muon for the matrices of hidden layers and AdamW for everything else, as one optimizer: `training.optim: muon`.

transformers has no name for it; Trainer takes it as a factory (`Trainer.optimizer_cls_and_kwargs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hfstrat.errors import UserError

NAME = "muon"


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for the groups with `muon: True`, `torch.optim.AdamW` for the others.

    Muon orthogonalizes the momentum of a matrix (Jordan et al. 2024). Its step is scaled to the root mean square of AdamW's
    (Liu et al. 2025, arXiv 2502.16982), so that both take the same learning rate and weight decay.

    Args:
        groups: parameter groups, each with `muon`, `weight_decay` and what else its optimizer takes.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        muon: dict[str, Any] = {"lr": lr, "adjust_lr_fn": "match_rms_adamw"}
        adamw: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "fused": True}
        self.parts: dict[bool, torch.optim.Optimizer] = {}
        complete: list[dict[str, Any]] = []
        for is_muon, make, options in ((True, torch.optim.Muon, muon), (False, torch.optim.AdamW, adamw)):
            chosen = [group for group in groups if bool(group["muon"]) == is_muon]
            if chosen:
                self.parts[is_muon] = make(chosen, **options)  # type: ignore[operator]
                complete += self.parts[is_muon].param_groups
        super().__init__(complete, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; groups and state are this optimizer's own, so that it is saved and scheduled as one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for is_muon, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            part.state = self.state
            part.step()
        return loss


def hidden_matrices(model: nn.Module) -> set[int]:
    """The `id` of each trainable matrix of a hidden layer: not of embeddings, of an LM head or of a classifier's head."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    body: nn.Module = inner.base_model
    tables = {id(p) for module in body.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = inner.get_output_embeddings()
    tables |= set() if head is None else {id(p) for p in head.parameters()}
    trainable = ((name, p) for name, p in body.named_parameters() if p.requires_grad and p.ndim == 2)
    return {id(p) for name, p in trainable if id(p) not in tables and "embed" not in name}


def check(model: nn.Module) -> None:
    """Raises UserError where no matrix of a hidden layer is trained."""
    if not hidden_matrices(model):
        raise UserError(
            "training.optim: muon updates matrices of hidden layers, and this strategy trains none of them; "
            "set adamw_torch_fused"
        )


def make(model: nn.Module, decayed: set[str], lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Muon:
    """The optimizer of a model.

    Args:
        decayed: names of parameters with weight decay.

    Raises:
        UserError: no matrix of a hidden layer is trained.
    """
    check(model)
    matrices, groups = hidden_matrices(model), dict[tuple[bool, bool], list[nn.Parameter]]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in matrices, name in decayed), []).append(parameter)
    listed = [
        {"params": groups[kind], "muon": kind[0], "weight_decay": weight_decay if kind[1] else 0.0}
        for kind in sorted(groups, reverse=True)
    ]
    return Muon(listed, lr, betas, eps)


def factory(trainer: Any) -> tuple[Any, dict[str, Any]]:
    """The value of `Trainer.optimizer_cls_and_kwargs` for this optimizer."""
    args: TrainingArguments = trainer.args

    def build(model: nn.Module, **options: Any) -> Muon:
        return make(model, set(trainer.get_decay_parameter_names(model)), **options)

    betas = (args.adam_beta1, args.adam_beta2)
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": betas, "eps": args.adam_epsilon}
    return lambda: build, options
