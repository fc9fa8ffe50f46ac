"""Cached hidden states in place of a frozen prefix: the model keeps its embeddings, masks, positions and layer numbers.

Cutting a model and passing `inputs_embeds` fails silently: positions are added twice, and layers are renumbered. So the model
stays complete. If a batch contains cached states, the frozen blocks return their input, and the last of them returns the
cached states; otherwise every block computes as usual.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hfstrat.models.blocks import evaluating, find_blocks, input_parameters
from hfstrat.models.quantization import is_quantized, keeps_outliers

COLUMN = "boundary_states"
NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|final_norm|norm_f)$")
Batch = dict[str, torch.Tensor]
RAW: dict[torch.dtype, Any] = {
    torch.float32: np.dtype("float32"),
    torch.bfloat16: np.dtype("int16"),
    torch.float16: np.dtype("int16"),
}


class Named(NamedTuple):
    """A module and its name in the model."""

    name: str
    module: nn.Module


def named_blocks(model: nn.Module) -> list[Named]:
    """The transformer blocks, first to last; empty if they cannot be identified."""
    found = find_blocks(model)
    return [Named(f"{found.name}.{index}", block) for index, block in enumerate(found.modules)] if found else []


def final_norm(model: nn.Module, blocks: list[Named]) -> Named | None:
    """The norm next to the list of blocks, if there is one."""
    parent = blocks[0].name.rpartition(".")[0].rpartition(".")[0]
    beside = [(f"{parent}.{name}".lstrip("."), child) for name, child in model.get_submodule(parent).named_children()]
    return next((Named(name, child) for name, child in beside if NORM.search(name)), None)


class _BoundaryReached(Exception):
    """Stops a forward pass at the boundary."""


class Boundary:
    """The end of a model's frozen part, where hidden states can be read and replaced.

    Args:
        model: as the Trainer gets it.
        skipped: the frozen modules in call order: blocks, and the final norm if all blocks are frozen.
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
        """Replace the forwards of these instances, so that the model takes `boundary_states` (`[B, T, H]`) as an input."""
        for named in self.skipped:
            self._before.append((named.module, vars(named.module).get("forward")))
            named.module.forward = self._passing(named.module.forward, is_last=named is self.skipped[-1])
        self._hooks = [
            self.model.register_forward_pre_hook(self._accept, with_kwargs=True),
            self.model.register_forward_hook(self._forget, always_call=True),
        ]
        self.is_bound = True

    def unbind(self) -> None:
        """Restore the forwards; does nothing if they are not replaced."""
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
        """The hidden states `[B, T, H]` at the boundary; the blocks after it are not run."""
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
    """The number of first blocks whose outputs depend on no trainable parameter."""
    touched: list[bool] = []

    def look(module: nn.Module, args: Any, given: Any) -> None:
        touched.append(bool((given[0] if isinstance(given, tuple) else given).requires_grad))

    with ExitStack() as hooks, evaluating(model), torch.enable_grad():
        for block in blocks:
            hooks.enter_context(block.module.register_forward_hook(look))
        model(**batch)
    if len(touched) != len(blocks):
        return 0
    return touched.index(True) if True in touched else len(blocks)


def modules_before(boundary: Boundary, batch: Batch) -> dict[str, nn.Module]:
    """The modules, by name, that have run when the boundary is reached: embeddings, frozen blocks, ..."""
    done: dict[str, nn.Module] = {}
    names = {module: name for name, module in boundary.model.named_modules()}

    def note(module: nn.Module, args: Any, given: Any) -> None:
        done[names[module]] = module

    with ExitStack() as hooks, evaluating(boundary.model), torch.no_grad():
        for module in names:
            hooks.enter_context(module.register_forward_hook(note))
        boundary.take(batch)
    last = boundary.skipped[-1]
    inside = {f"{last.name}.{name}": m for name, m in last.module.named_modules() if name}
    return done | {last.name: last.module} | inside  # the exception left its own forward


class Still:
    """Keeps modules in evaluation mode whatever the Trainer sets, so that the frozen part has no dropout."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        for module in modules:
            module.train = MethodType(lambda self, mode=True: nn.Module.train(self, False), module)  # type: ignore[method-assign]
            module.training = False

    def release(self) -> None:
        for module in self.modules:
            vars(module).pop("train", None)


class Refused(Exception):
    """The frozen part cannot be cached; the message gives the reason."""


@dataclass
class Prefix:
    """The frozen part of a model: its end, the number of its blocks and of all blocks, and all modules that run in it."""

    boundary: Boundary
    frozen: int
    blocks: int
    modules: dict[str, nn.Module]


def find_prefix(model: nn.Module, batch: Batch) -> Prefix:
    """The longest frozen prefix of a model, with its boundary bound.

    Args:
        batch: collated examples, without labels, on the model's device.

    Raises:
        Refused: no block is frozen, or the blocks cannot be identified.
    """
    if not (blocks := named_blocks(model)):
        raise Refused(f"the transformer blocks of {type(model).__name__} cannot be identified")
    try:
        frozen = frozen_depth(model, blocks, batch)
    except Exception as error:  # an unknown structure can fail in any way
        raise Refused(f"its blocks cannot be run one by one ({type(error).__name__}: {error})") from error
    if not frozen:
        raise Refused(_why_nothing_is_frozen(model))
    if any(getattr(block.module, "_compiled_call_impl", None) for block in blocks):
        raise Refused("its blocks are compiled, and a compiled block cannot be skipped")
    skipped = blocks[:frozen]
    norm = final_norm(model, blocks)
    if frozen == len(blocks) and norm and not any(p.requires_grad for p in norm.module.parameters()):
        skipped = [*skipped, norm]
    boundary = Boundary(model, skipped)
    boundary.bind()
    try:
        return Prefix(boundary, frozen, len(blocks), modules_before(boundary, batch))
    except Exception:
        boundary.unbind()
        raise


def _why_nothing_is_frozen(model: Any) -> str:
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any("lora_" in name for name in trainable):
        return "adapters are trained in the first block, or before it"
    if any(parameter.requires_grad for parameter in input_parameters(model)):
        head = model.get_output_embeddings()
        tied = head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight
        return f"the input embeddings are trained{', since they are tied to the LM head' if tied else ''}"
    return f"parameters are trained in the first block, or before it ({trainable[0] if trainable else 'nothing is frozen'})"


def can_precompute(prefix: Prefix, batch: Batch) -> str | None:
    """The reason why the outputs of the prefix differ between epochs, or None."""
    config, boundary = prefix.boundary.model.config, prefix.boundary
    if dropped := [name for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop") if getattr(config, name, 0)]:
        return f"layers are skipped at random ({dropped[0]} in the model's config)"
    if mixed := [name for name, module in prefix.modules.items() if is_quantized(module) and keeps_outliers(module)]:
        return f"the output of an int8 layer depends on outliers of the other examples in the batch ({mixed[0]})"
    with torch.no_grad(), torch.random.fork_rng(), evaluating(boundary.model):
        calm = boundary.take(batch)
        boundary.model.train()
        torch.manual_seed(0)
        trained = boundary.take(batch)
    if calm.dtype not in RAW:
        return f"its hidden states are {str(calm.dtype).removeprefix('torch.')}"
    if not torch.equal(calm, trained):
        active = [(name, value) for name, module in prefix.modules.items() if (value := _dropout_rate(module))]
        if active:
            name, value = active[0]
            return f"dropout is active in the frozen part ({name}: {value:g}); set strategy.frozen_dropout: false"
        return "the frozen part computes different outputs in training and in evaluation"
    return None


def _dropout_rate(module: nn.Module) -> float:
    """The rate of a dropout module, or of an attention with dropout of its own."""
    values = [module.p] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else []
    values += [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return float(max(values, default=0.0))
