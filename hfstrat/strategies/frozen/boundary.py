"""Stored hidden states in place of a frozen prefix: the model keeps its embeddings, masks, positions and layer numbers.

Cutting a model and feeding it `inputs_embeds` breaks without a word: positions are added twice, and layers are numbered anew.
So the model stays whole. Where a batch brings stored states, its frozen blocks hand on what they are given, and the last of
them gives the stored states; where it brings none, every block does its own work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hfstrat.models.blocks import find_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMN = "boundary_states"
NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|final_norm|norm_f)$")
Batch = dict[str, torch.Tensor]


class Named(NamedTuple):
    """A module and its name in the model."""

    name: str
    module: nn.Module


def named_blocks(model: nn.Module) -> list[Named]:
    """The transformer blocks, first to last; empty where nobody can tell which they are."""
    found = find_blocks(model)
    return [Named(f"{found.name}.{index}", block) for index, block in enumerate(found.modules)] if found else []


def final_norm(model: nn.Module, blocks: list[Named]) -> Named | None:
    """The norm that stands beside the list of blocks, where there is one."""
    parent = blocks[0].name.rpartition(".")[0].rpartition(".")[0]
    beside = [(f"{parent}.{name}".lstrip("."), child) for name, child in model.get_submodule(parent).named_children()]
    return next((Named(name, child) for name, child in beside if NORM.search(name)), None)


class _BoundaryReached(Exception):
    """The boundary is reached; nobody needs what comes after it."""


class Boundary:
    """The end of a model's frozen part, where hidden states can be taken and put in.

    Args:
        model: as the Trainer gets it.
        skipped: what is frozen, in the order it is called: blocks, and the final norm after all of them.
    """

    def __init__(self, model: nn.Module, skipped: list[Named]) -> None:
        self.model, self.skipped = model, skipped
        self.is_bound = False
        self._states: torch.Tensor | None = None
        self._taken: torch.Tensor | None = None
        self._taking = self._gives_tuple = False
        self._before: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []

    def bind(self) -> None:
        """Bind the forwards on these instances, and let the model take `boundary_states` (`[B, T, H]`) beside its inputs."""
        for named in self.skipped:
            self._before.append((named.module, vars(named.module).get("forward")))
            named.module.forward = self._passing(named.module.forward, is_last=named is self.skipped[-1])
        self._hooks = [
            self.model.register_forward_pre_hook(self._accept, with_kwargs=True),
            self.model.register_forward_hook(self._forget, always_call=True),
        ]
        self.is_bound = True

    def unbind(self) -> None:
        """Leave no trace; also where nothing was bound."""
        for module, forward in self._before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        for hook in self._hooks:
            hook.remove()
        self._before, self._hooks, self.is_bound = [], [], False

    def _accept(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._states = kwargs.get(COLUMN)
        return args, {name: value for name, value in kwargs.items() if name != COLUMN}

    def _forget(self, *_: Any) -> None:
        self._states = None

    def _passing(self, original: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._states is None:
                given = original(*args, **kwargs)
                if is_last and self._taking:
                    self._gives_tuple = isinstance(given, tuple)
                    self._taken = given[0] if isinstance(given, tuple) else given
                    raise _BoundaryReached
                return given
            states = self._states if is_last else args[0] if args else kwargs["hidden_states"]
            return (states,) if self._gives_tuple else states

        return forward

    def take(self, batch: Batch) -> torch.Tensor:
        """The hidden states `[B, T, H]` at the boundary; what comes after it is not computed."""
        self._taking = True
        try:
            self.model(**batch)
        except _BoundaryReached:
            pass
        finally:
            self._taking = False
        taken, self._taken = self._taken, None
        if taken is None:
            raise RuntimeError("the frozen blocks are not called")
        return taken


def frozen_depth(model: nn.Module, blocks: list[Named], batch: Batch) -> int:
    """How many of the first blocks give what nothing that learns has touched."""
    touched: list[bool] = []

    def look(module: nn.Module, args: Any, given: Any) -> None:
        touched.append(bool((given[0] if isinstance(given, tuple) else given).requires_grad))

    hooks = [block.module.register_forward_hook(look) for block in blocks]
    try:
        with evaluating(model), torch.enable_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(touched) != len(blocks):
        return 0
    return touched.index(True) if True in touched else len(blocks)


def modules_before(boundary: Boundary, batch: Batch) -> dict[str, nn.Module]:
    """The modules, by name, that have done all their work when the boundary is reached: embeddings, frozen blocks, ..."""
    done: dict[str, nn.Module] = {}
    names = {module: name for name, module in boundary.model.named_modules()}

    def note(module: nn.Module, args: Any, given: Any) -> None:
        done[names[module]] = module

    hooks = [module.register_forward_hook(note) for module in names]
    try:
        with evaluating(boundary.model), torch.no_grad():
            boundary.take(batch)
    finally:
        for hook in hooks:
            hook.remove()
    last = boundary.skipped[-1]
    inside = {f"{last.name}.{name}": m for name, m in last.module.named_modules() if name}
    return done | {last.name: last.module} | inside  # its own forward was left by the exception


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each module as it was afterwards."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in were:
            module.training = training


class Still:
    """Modules kept in evaluation mode whatever the Trainer sets: no dropout in what is frozen."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        for module in modules:
            module.train = self._never(module)  # type: ignore[method-assign]
            module.training = False

    def _never(self, module: nn.Module) -> Callable[..., nn.Module]:
        return lambda mode=True: nn.Module.train(module, False)

    def release(self) -> None:
        for module in self.modules:
            vars(module).pop("train", None)
        self.modules = []
