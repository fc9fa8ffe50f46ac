"""Partial fine-tuning: the last blocks, the head, or parameters chosen by name; the rest is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hfstrat.class_heads import CLASS_HEAD
from hfstrat.errors import UserError
from hfstrat.strategies.base import Default, Footprint, Shapes, Strategy

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.model import Base

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|norm_f)\.(?:weight|bias)$")


class Partial(Strategy):
    """Some of the model's own weights learn; the others are frozen and stay out of the optimiser."""

    name: Literal["partial"]
    last_n_layers: int = Field(0, ge=0, description="How many of the last transformer blocks learn, with the final norm")
    patterns: list[str] = Field([], description="Shell patterns over parameter names, such as '*.mlp.*', that learn too")
    head: bool | Literal["auto"] = Field(
        "auto", description="Whether the LM head learns; auto: yes, unless it is tied. A classifier's head always does"
    )
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(5e-5, "the BERT paper's upper choice (arXiv 1810.04805, A.3), as part of the weights learn"),
    }

    @model_validator(mode="after")
    def _something_learns(self) -> Partial:
        if not (self.last_n_layers or self.patterns or self.head):
            raise ValueError("nothing would learn: set last_n_layers, patterns or head")
        return self

    def chosen(self, names: Iterable[str], tied: bool) -> set[str]:
        """The names of the parameters that learn.

        Raises:
            UserError: more layers than the model has, a pattern that matches nothing, or nothing chosen.
        """
        names = list(names)
        chosen = self._last_layers(names)
        for pattern in self.patterns:
            matched = {name for name in names if fnmatchcase(name, pattern)}
            if not matched:
                raise UserError(
                    f"strategy.patterns: {pattern!r} matches no parameter of this model, such as {names[0]!r} or "
                    f"{names[len(names) // 2]!r}; `hfstrat check RECIPE` lists them"
                )
            chosen |= matched
        if self.head is True or (self.head == "auto" and not tied):
            chosen |= {name for name in names if (EMBEDDING if tied else HEAD).search(name) or CLASS_HEAD.search(name)}
        if not chosen:
            raise UserError(
                "strategy: nothing would learn: the LM head is tied to the embeddings, so `head: auto` leaves it frozen; "
                "set last_n_layers or patterns, or `head: true` to train the shared matrix"
            )
        return chosen

    def _last_layers(self, names: list[str]) -> set[str]:
        blocks = {name: int(match.group(1)) for name in names if (match := BLOCK.search(name))}
        count = max(blocks.values(), default=-1) + 1
        if self.last_n_layers > count:
            raise UserError(f"strategy.last_n_layers: given {self.last_n_layers}, but this model has {count} layers")
        if not self.last_n_layers:
            return set()
        chosen = {name for name, index in blocks.items() if index >= count - self.last_n_layers}
        return chosen | {name for name in names if FINAL_NORM.search(name) and name not in blocks}

    def build_model(self, base: Base) -> nn.Module:
        model = base.model
        tied = base.is_tied
        chosen = self.chosen((name for name, _ in model.named_parameters()), tied)
        head = tuple(f"{module}." for module in base.head_modules)  # is new, so that it learns whatever it is called
        chosen |= {name for name, _ in model.named_parameters() if name.startswith(head)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        shared = [name for name in chosen if tied and EMBEDDING.search(name)]
        if base.new_token_ids and not model.get_input_embeddings().weight.requires_grad:
            raise UserError(
                "model.add_tokens: the new tokens' embeddings are frozen under this recipe and would stay random; "
                "add '*embed_tokens*' (or this model's name for it) to strategy.patterns, or use lora or full"
            )
        if shared:
            base.say(f"tied embeddings: {shared[0]} is both the input embeddings and the LM head; both learn")
        elif tied:
            base.say("tied embeddings: the LM head is the frozen embedding matrix and stays as it is")
        return model

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.model import cast_weights

        cast_weights(model, base.compute_dtype)  # the frozen weights were rounded to it

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        chosen = self.chosen(shapes, tied)
        return Footprint(
            sum(prod(shape) for name, shape in shapes.items() if name in chosen),
            sum(prod(shape) for shape in shapes.values()),
        )
