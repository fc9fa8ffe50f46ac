"""Head-only training: the body is a frozen feature extractor that runs once, and its head is trained or solved."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.parameter_names import BLOCK, CLASS_HEAD, HEAD, count_blocks, embeddings_of
from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import Built, Prepared, Strategy
from hfstrat.strategies.checks import inner_keys
from hfstrat.strategies.description import Description, Footprint, count
from hfstrat.strategies.frozen import page as frozen_page
from hfstrat.strategies.full import Full
from hfstrat.strategies.head import page
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, FSDP

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.schema import Model, Recipe
    from hfstrat.strategies.head.heads import ClassifierHead
    from hfstrat.tasks.report import Result
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer

LAST_LAYERS = ("score", "classifier", "out_proj")
CONTINUATIONS: dict[str, type[Strategy[Any]]] = {"partial": Partial, "lora": Lora, "full": Full}


def build(section: section.Head) -> Strategy[section.Head]:
    """The strategy of a section: with `then` another strategy continues from the solved head."""
    return Head(section) if section.then is None else HeadThen(section)


class Head(Strategy[section.Head]):
    """A classifier's head on features that are computed once, or the LM head of a causal LM."""

    def __init__(self, section: section.Head) -> None:
        super().__init__(section)
        self.classifier: ClassifierHead | None = None  # where it is not an LM head

    def check_task(self, task: Task) -> None:
        _check_task(self.section, task)
        by_transformers = self.section.pooling == "last" and self.section.head == "linear" and not self.section.contrastive
        if task.model.reads_tokens and not task.text.generates and not by_transformers:
            from hfstrat.tasks.sentence_transformers import check_installed

            check_installed()

    def model_of(self, recipe: Recipe) -> Model:
        """Its body alone is used, which every class has."""
        return recipe.model.model_copy(update={"pooling": "class"})

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        super().check(recipe, wrapping, network)
        if recipe.training.class_weights == "focal" and self.section.head == "linear" and self.section.solver != "trainer":
            raise UserError(
                "training.class_weights: focal: the focal loss has no exact solution; set strategy.solver: trainer, or balanced"
            )
        if recipe.image.views > 1 and (self.section.head != "linear" or self.section.solver == "trainer"):
            raise UserError(f"image.views: {recipe.image.views}: they are for a linear head that is solved; remove it")
        if recipe.model.pooling is not None:
            raise UserError("model.pooling: strategy head selects the pooling itself (strategy.pooling); remove it")
        if recipe.training.head_learning_rate is not None:
            raise UserError(
                "training.head_learning_rate: strategy head trains nothing else; set training.learning_rate, or remove it"
            )
        if wrapping in (FSDP, DEEPSPEED):
            raise UserError(
                "strategy.name: head: the body runs once before training, and the head is small, so there is nothing to shard; "
                "use --accelerate-config ddp, or strategy partial"
            )

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        """With `layer: auto` all blocks are counted, since the end of the body is chosen later."""
        wanted, shapes_left = self.section, _cut(self.section, shapes)
        classifier = _classifier_of(shapes)
        if classifier is None:
            return self._describe_language_head(shapes, tied)
        hidden = wanted.hidden_size if wanted.head == "mlp" else None
        head = _head_size(shapes, classifier, hidden, reads_last=wanted.pooling == "last")
        footprint = Footprint(head, head + _body_size(shapes_left))
        if wanted.contrastive:
            names = frozenset(name for name in shapes if not CLASS_HEAD.search(name)) | {f"{classifier}.weight"}
            return Description(Footprint(footprint.total, footprint.total), names, shapes, saves_model=False)
        return Description(footprint, frozenset({f"{classifier}.weight"}), shapes, saves_model=False, body_once=True)

    def _describe_language_head(self, shapes: Shapes, tied: bool) -> Description:
        if tied:  # a copy of the embeddings
            self._check_tied()
            shapes = shapes | {"lm_head.weight": shapes[embeddings_of(shapes)]}
        names = frozenset(name for name in shapes if HEAD.search(name) or name == "head.weight")
        footprint = Footprint(sum(prod(shapes[name]) for name in names), count(shapes))
        return Description(footprint, names, shapes, saves_model=False, body_once=True)

    def _check_tied(self) -> None:
        if not self.section.untie:
            raise UserError(
                "strategy.untie: the LM head of this model is tied to its embeddings (tie_word_embeddings), so it cannot be "
                "trained alone; untie: true gives it a matrix of its own, with as many parameters. Or use partial, lora or full"
            )

    def build(self, base: Base, data: TrainData) -> Built:
        if base.model.get_output_embeddings() is not None:
            return super().build(base, data)
        from hfstrat.strategies.head.heads import classifier_head

        data, self.classifier = classifier_head(self.section, base, data)
        return Built(self.classifier.model, data)

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat.strategies.head.heads import language_head, preview

        if base.is_tied:
            self._check_tied()
        return preview(base) if base.model.get_output_embeddings() is None else language_head(base)

    def prepare(self, model: nn.Module, data: TrainData) -> Prepared:
        if self.classifier is None:
            from hfstrat.strategies.frozen.precompute import precompute

            try:
                return Prepared(precompute(data, model, "auto", still=True))
            except UserError:  # the frozen part is unknown: it is computed in every step, and the run says so
                return Prepared(precompute(data, model, "auto"))
        if not self.classifier.model.is_solved:
            return Prepared(data)
        from hfstrat.strategies.head.heads import SolvedTrainer

        strength = None if self.section.l2 == "auto" else float(self.section.l2)
        return Prepared(data, SolvedTrainer, {"l2": strength, "facts": self.classifier.facts})

    def finish(self, model: nn.Module, base: Base) -> None:
        if self.classifier is not None:
            self.classifier.publish()
        else:
            from hfstrat.models.load import cast_weights

            cast_weights(model, base.compute_dtype)  # the frozen weights are in this precision already

    def published(self, model: nn.Module, base: Base) -> nn.Module:
        return base.model if self.classifier is not None and self.classifier.by_transformers else model

    @property
    def predicts_out_of_fold(self) -> bool:
        return self.section.head == "linear" and self.section.solver != "trainer"

    def out_of_fold(self, trainer: StrategyTrainer) -> tuple[np.ndarray, np.ndarray] | None:
        if self.classifier is None or not self.predicts_out_of_fold:
            return None
        from hfstrat.strategies.head.linear import out_of_fold

        rows: Any = trainer.train_dataset
        strength, bias = self.classifier.facts.get("l2"), not self.classifier.by_transformers
        each, classes = trainer.metrics.row_weights(rows.labels), len(trainer.metrics.labels)
        each = None if rows.labels.is_floating_point() else each
        logits = out_of_fold(rows.features, rows.labels, classes, strength, bias, rows.views, each)
        count = len(rows) // rows.views
        return logits[:count].numpy(), rows.labels[:count].numpy()

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        if self.classifier is None:
            super().save(trainer, folder, base)
        elif trainer.args.should_save:
            self.classifier.save(trainer, folder)

    def sections(self, result: Result) -> list[Section]:
        return [*page.sections(result), *frozen_page.sections(result)]


class HeadThen(Strategy[section.Head]):
    """The head of transformers' own class is solved, and another strategy continues from it."""

    def __init__(self, section: section.Head) -> None:
        super().__init__(section)
        assert section.then is not None
        self.then = CONTINUATIONS[section.then.name](section.then)

    def check_task(self, task: Task) -> None:
        _check_task(self.section, task)
        with inner_keys("then"):
            self.then.check_task(task)

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        super().check(recipe, wrapping, network)
        if recipe.image.views > 1:
            raise UserError(
                f"image.views: {recipe.image.views}: strategy.then trains on other changes in each epoch; remove it"
            )
        with inner_keys("then"):
            self.then.check(recipe, wrapping, network)

    def set_family(self, family: str, generates: bool) -> None:
        self.then.set_family(family, generates)

    def model_of(self, recipe: Recipe) -> Model:
        return self.then.model_of(recipe)

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        shapes = _cut(self.section, shapes)
        with inner_keys("then"):
            return self.then.describe(shapes, tied)

    def build(self, base: Base, data: TrainData) -> Built:
        from hfstrat.strategies.head.heads import solve_head

        data = solve_head(self.section, base, data)
        return Built(self.build_model(base), data)

    def build_model(self, base: Base) -> nn.Module:
        with inner_keys("then"):
            return self.then.build_model(base)

    def prepare(self, model: nn.Module, data: TrainData) -> Prepared:
        with inner_keys("then"):
            return self.then.prepare(model, data)

    def finish(self, model: nn.Module, base: Base) -> None:
        self.then.finish(model, base)

    def published(self, model: nn.Module, base: Base) -> nn.Module:
        return self.then.published(model, base)

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        self.then.save(trainer, folder, base)

    def sections(self, result: Result) -> list[Section]:
        return [*page.sections(result), *self.then.sections(result)]


def _check_task(section: section.Head, task: Task) -> None:
    """Refuse keys of a classifier's head for an LM head, and the other way round."""
    if task.text.generates:
        of_classifiers = ("layer", "pooling", "head", "hidden_size", "solver", "l2", "then", "contrastive")
        if odd := [key for key in of_classifiers if key in section.model_fields_set]:
            raise UserError(f"strategy.{odd[0]}: it is for classifiers; the LM head is always on the last layer, so remove it")
    elif not task.model.reads_tokens and section.contrastive:
        raise UserError(f"strategy.contrastive: true: it compares texts, and {task.name} has none; remove contrastive")
    elif not task.model.reads_tokens and (section.pooling != "auto" or section.head != "linear"):
        key = "pooling" if section.pooling != "auto" else "head"
        raise UserError(
            f"strategy.{key}: {getattr(section, key)}: a model for {task.name} pools as its class in transformers, which has a "
            "linear head; remove it"
        )
    elif section.untie:
        raise UserError("strategy.untie: the head of a classifier is not tied to the embeddings; remove it")


def _cut(section: section.Head, shapes: Shapes) -> Shapes:
    """The shapes without the blocks after `layer`; all of them if it is selected later. Raises UserError."""
    layer = section.layer
    if isinstance(layer, int) and layer > (depth := count_blocks(shapes)):
        raise UserError(f"strategy.layer: given {layer}, but this model has {depth} layers")
    if layer == "auto":
        return shapes
    return {name: s for name, s in shapes.items() if not (match := BLOCK.search(name)) or int(match.group(1)) < layer}


def _classifier_of(shapes: Shapes) -> str | None:
    """The name of a classifier's last linear layer, or None."""
    names = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight") and not BLOCK.search(name)]
    return next((name for name in reversed(names) if name.rpartition(".")[2] in LAST_LAYERS), None)


def _head_size(shapes: Shapes, classifier: str, hidden: int | None, reads_last: bool) -> int:
    """Parameters of a head on pooled features.

    Args:
        hidden: width of an MLP's hidden layer.
        reads_last: whether the last token is pooled, for which heads of transformers on decoders have no bias.
    """
    classes, width = shapes[f"{classifier}.weight"]
    if hidden is not None:
        return width * hidden + hidden + hidden * classes + classes
    return width * classes + (0 if reads_last and f"{classifier}.bias" not in shapes else classes)


def _body_size(shapes: Shapes) -> int:
    """Parameters of the body without transformers' own head."""
    return sum(prod(s) for name, s in shapes.items() if not CLASS_HEAD.search(name) or ".pooler." in name)
