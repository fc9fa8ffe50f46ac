"""Partial fine-tuning: the last blocks, the head, or parameters selected by name are trained; the rest is frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.parameter_names import BLOCK, CLASS_HEAD, EMBEDDING, FINAL_NORM, HEAD, count_blocks, height, stages
from hfstrat.models.vocabulary import refuse_frozen
from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import Prepared, Strategy
from hfstrat.strategies.description import Description, Footprint, count
from hfstrat.strategies.frozen import page
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, FSDP

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.base import Task
    from hfstrat.tasks.report import Result
    from hfstrat.trainer.train_data import TrainData


class Partial(Strategy[section.Partial]):
    """Some of the model's own weights are trained; the others are frozen and not in the optimizer."""

    has_pretrained_body = True

    def check_task(self, task: Task) -> None:
        if not task.text.generates and self.section.head is False:
            raise UserError(
                f"strategy.head: false: a head for {task.name} is new and random, so it has to be trained; remove it"
            )

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        super().check(recipe, wrapping, network)
        if self.section.gradual_unfreezing is not None and wrapping != ALONE:
            raise UserError("strategy.gradual_unfreezing: changing the trainable parameters needs a single process; remove it")
        if not self.section.frozen_dropout and wrapping in (FSDP, DEEPSPEED):
            raise UserError(
                "strategy.frozen_dropout: false needs the full model on each process; remove it, or use --accelerate-config ddp"
            )
        if self.section.precompute is True and wrapping in (FSDP, DEEPSPEED):
            raise UserError(
                "strategy.precompute: true needs the full model on each process; set auto or false, or use "
                "--accelerate-config ddp"
            )

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        chosen = frozenset(self.chosen(shapes, tied))
        return Description(
            Footprint(sum(prod(shapes[name]) for name in chosen), count(shapes)),
            chosen,
            shapes,
            unquantized=chosen,
            keeps_prefix=self.section.precompute is not False,
            still=not self.section.frozen_dropout,
        )

    def chosen(
        self,
        names: Iterable[str],
        tied: bool,
        beside: Collection[str] = (),
        scope: Callable[[str], bool] | None = None,
    ) -> set[str]:
        """The names of the trainable parameters.

        Args:
            beside: those that are trained anyway, and no blocks to count.
            scope: whether a parameter is of the stack that `last_n_layers`, `head` and `embeddings` are about; by default all.

        Raises UserError: more layers than the model has, a pattern that matches nothing, or nothing to train.
        """
        names = list(names)
        own = names if scope is None else [name for name in names if scope(name)]
        chosen = self._last_layers([name for name in own if name not in beside]) | set(beside)
        for pattern in self.section.patterns:
            matched = {name for name in names if fnmatchcase(name, pattern)}
            if not matched:
                raise UserError(
                    f"strategy.patterns: {pattern!r} matches no parameter; this model has {names[0]!r}, "
                    f"{names[len(names) // 2]!r} and others, which `hfstrat check RECIPE` lists"
                )
            chosen |= matched
        if self.section.head is True or (self.section.head == "auto" and not tied):
            chosen |= {name for name in own if (EMBEDDING if tied else HEAD).search(name) or CLASS_HEAD.search(name)}
        if self.section.embeddings:
            chosen |= {name for name in own if EMBEDDING.search(name)}
        if not chosen:
            raise UserError(
                "strategy: no parameter would be trained: the LM head is tied to the embeddings, so `head: auto` freezes it; "
                "set last_n_layers or patterns, or `head: true` to train the shared matrix"
            )
        return chosen

    def _last_layers(self, names: list[str]) -> set[str]:
        count = count_blocks(names)
        if self.section.last_n_layers > count:
            raise UserError(f"strategy.last_n_layers: given {self.section.last_n_layers}, but this model has {count} layers")
        if not self.section.last_n_layers:
            return set()
        last = {name for name in names if count - self.section.last_n_layers < height(name, count) <= count}
        return last | {name for name in names if FINAL_NORM.search(name) and not BLOCK.search(name)}

    def build_model(self, base: Base) -> nn.Module:
        model, tied = base.model, base.is_tied
        names = [name for name, _ in model.named_parameters()]
        head = tuple(f"{module}." for module in base.head_modules)  # it is new, so it is trained
        beside = {name for name in names if name.startswith(head)}
        if base.backbone:
            beside |= {name for name in names if not name.startswith(f"{base.backbone}.")}
            base.say(
                f"partial trains all but the backbone ({base.backbone}), of which the last {self.section.last_n_layers} blocks"
            )
        chosen = self.chosen(names, tied, beside, base.task.model.has_language(base))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        shared = [name for name in chosen if tied and EMBEDDING.search(name)]
        refuse_frozen(base, "add '*embed_tokens*' (or this model's name for it) to strategy.patterns, or use lora or full")
        if shared:
            base.say(f"tied embeddings: {shared[0]} is both the input embeddings and the LM head; both are trained")
        elif tied:
            base.say("tied embeddings: the LM head is the frozen embedding matrix and is not trained")
        return model

    def prepare(self, model: nn.Module, data: TrainData) -> Prepared:
        from hfstrat.strategies.frozen.precompute import precompute

        wanted, thaw = self.section, self.section.gradual_unfreezing
        thawing = [] if thaw is None else [self._thaw_callback(thaw, model, data.plan.steps)]
        data = precompute(data, model, wanted.precompute, still=not wanted.frozen_dropout)
        if wanted.layer_decay == 1:
            return Prepared(data, callbacks=thawing)
        blocks = count_blocks(name for name, _ in model.named_parameters())
        rates = {"rate_of": lambda name: wanted.layer_decay ** (blocks + 1 - height(name, blocks))}
        return Prepared(data, trainer_kwargs=rates, callbacks=thawing)

    def _thaw_callback(self, thaw: section.GradualUnfreezing, model: nn.Module, steps: int) -> Any:
        """The callback that unfreezes parameters. Raises UserError if some would still be frozen at the end of the run."""
        from hfstrat.trainer.callbacks import Thawing
        from hfstrat.trainer.plan import ENDLESS

        trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        interval, parts = thaw.every, stages(trainable, count_blocks(name for name, _ in model.named_parameters()))
        if isinstance(interval, float) and steps >= ENDLESS:
            raise UserError("strategy.gradual_unfreezing.every: with max_time the number of steps is unknown; give whole steps")
        every = max(1, round(interval * steps)) if isinstance(interval, float) else interval
        if every * (len(parts) - 1) >= steps:
            raise UserError(
                f"strategy.gradual_unfreezing.every: {interval:g} ({every} steps) is too long for {len(parts)} parts in a run "
                f"of {steps} steps; at most {max(1, (steps - 1) // max(1, len(parts) - 1))}, or a smaller last_n_layers"
            )
        return Thawing(parts, every)

    def finish(self, model: nn.Module, base: Base) -> None:
        from hfstrat.models.load import cast_weights

        cast_weights(model, base.compute_dtype)  # the frozen weights are in this precision already

    def sections(self, result: Result) -> list[Section]:
        return page.sections(result)
