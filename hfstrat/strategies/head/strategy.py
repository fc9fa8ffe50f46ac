"""Only the head is trained; the body is a feature extractor that runs once."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.parameter_names import EMBEDDING, HEAD
from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import Footprint, Learning, Strategy
from hfstrat.strategies.full import Full
from hfstrat.strategies.head import shapes as head_shapes
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.trainer.distributed import DEEPSPEED, FSDP

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.strategies.head.heads import ClassifierHead
    from hfstrat.tasks.base import Task
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer

CONTINUATIONS: dict[str, type[Strategy[Any]]] = {"partial": Partial, "lora": Lora, "full": Full}


class Head(Strategy[section.Head]):
    """A head is trained, or solved; with `then` another strategy continues from it."""

    def __init__(self, section: section.Head) -> None:
        super().__init__(section)
        self.continuation = None if section.then is None else CONTINUATIONS[section.then.name](section.then)
        self.classifier: ClassifierHead | None = None  # built from the features of the data

    def learns_whole(self, names: list[str], tied: bool) -> set[str]:
        return set() if self.continuation is None else self.continuation.learns_whole(names, tied)

    # before torch

    def check(self, task: Task) -> None:
        """Refuse what the task cannot have, and a result that could not be saved."""
        if task.unit == "token":
            odd = [
                key
                for key in ("layer", "pooling", "head", "hidden_size", "solver", "l2", "then")
                if key in self.section.model_fields_set
            ]
            if odd:
                raise UserError(f"strategy.{odd[0]}: the LM head of a causal LM stands on its last layer; remove it")
            return
        if self.section.untie:
            raise UserError("strategy.untie: a classifier's head is not tied to the embeddings; remove it")
        if self.section.then is None and not (self.section.pooling == "last" and self.section.head == "linear"):
            from hfstrat.tasks.sentence_transformers import check_installed

            check_installed()

    def check_wrapping(self, wrapping: str) -> None:
        if (further := self.continuation) is not None:
            further.check_wrapping(wrapping)
        elif wrapping in (FSDP, DEEPSPEED):
            raise UserError(
                "strategy.name: head: what learns is small, and the body runs once before training, whole: nothing is "
                "gained by sharing it out; take --accelerate-config ddp, or strategy partial"
            )

    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        """With `layer: auto` nobody knows yet where the body will end, and all its blocks are counted."""
        layer = None if self.section.layer == "auto" else self.section.layer
        if layer is not None:
            head_shapes.check_depth(layer, head_shapes.depth_of(shapes))
        classifier = head_shapes.classifier_of(shapes)
        if classifier is None:
            return self._of_language_head(shapes, tied)
        if (further := self.continuation) is not None:
            return further.footprint(head_shapes.cut(shapes, layer), tied)
        hidden = self.section.hidden_size if self.section.head == "mlp" else None
        head = head_shapes.head_size(shapes, classifier, hidden, reads_last=self.section.pooling == "last")
        return Footprint(head, head + head_shapes.body_size(shapes, layer))

    def learning(self, shapes: Shapes, tied: bool) -> Learning:
        classifier = head_shapes.classifier_of(shapes)
        if (further := self.continuation) is not None:
            return further.learning(shapes, tied)
        if classifier is not None:
            return Learning(frozenset({f"{classifier}.weight"}), shapes, body_once=True)
        if tied:  # a copy of the embeddings
            shapes = shapes | {"lm_head.weight": next(s for name, s in shapes.items() if EMBEDDING.search(name))}
        return Learning(frozenset(name for name in shapes if HEAD.search(name)), shapes, body_once=True)

    def _of_language_head(self, shapes: Shapes, tied: bool) -> Footprint:
        total = sum(prod(shape) for shape in shapes.values())
        head = sum(prod(shape) for name, shape in shapes.items() if HEAD.search(name))
        if tied:
            self._check_tied()
            head = sum(prod(shape) for name, shape in shapes.items() if EMBEDDING.search(name))
            total += head
        return Footprint(head, total)

    def _check_tied(self) -> None:
        if not self.section.untie:
            raise UserError(
                "strategy.untie: this model's LM head is its input embeddings (tie_word_embeddings), so it cannot learn alone; "
                "untie: true gives it a head of its own, for as many parameters more. Or take partial, lora or full"
            )

    # with torch

    def prepare_base(self, base: Base, data: TrainData) -> TrainData:
        if base.model.get_output_embeddings() is not None:
            return data
        from hfstrat.strategies.head.heads import classifier_head

        data, self.classifier = classifier_head(self.section, base, data)
        return data

    def build_model(self, base: Base) -> nn.Module:
        if (further := self.continuation) is not None:
            return further.build_model(base)
        if self.classifier is not None:
            return self.classifier.model
        from hfstrat.strategies.head.heads import language_head, preview

        if base.is_tied:
            self._check_tied()
        return preview(base) if base.model.get_output_embeddings() is None else language_head(base)

    def prepare_data(self, data: TrainData, model: nn.Module) -> TrainData:
        if (further := self.continuation) is not None:
            return further.prepare_data(data, model)
        if hasattr(model, "pooling"):
            return data
        from hfstrat.strategies.frozen.precompute import precompute

        try:
            return precompute(data, model, "auto", still=True)
        except UserError:  # nobody knows what is frozen: it is computed in every step, and the run says so
            return precompute(data, model, "auto")

    def build_trainer(self, **arguments: Any) -> StrategyTrainer:
        further, model = self.continuation, arguments["model"]
        if further is not None:
            return further.build_trainer(**arguments)
        if getattr(model, "is_solved", False):
            from hfstrat.strategies.head.heads import SolvedTrainer

            strength = None if self.section.l2 == "auto" else float(self.section.l2)
            return SolvedTrainer(strength, **arguments)
        return super().build_trainer(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        if (further := self.continuation) is not None:
            further.finish(model, base)
        elif self.classifier is not None:
            self.classifier.publish()
        else:
            from hfstrat.models.load import cast_weights

            cast_weights(model, base.compute_dtype)  # the frozen weights were rounded to it

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        further = self.continuation
        return 12 * footprint.trainable if further is None else further.checkpoint_bytes(footprint)

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        if (further := self.continuation) is not None:
            further.save(trainer, folder, base)
        elif self.classifier is None:
            super().save(trainer, folder, base)
        elif trainer.args.should_save:
            self.classifier.save(trainer, folder)
