"""Only the head learns; the body is a feature extractor that runs once."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from hfstrat.errors import UserError
from hfstrat.models.parameter_names import EMBEDDING, HEAD
from hfstrat.recipe.section import Default, Shapes
from hfstrat.strategies.base import Footprint, Learning, Strategy
from hfstrat.strategies.full import Full
from hfstrat.strategies.head import shapes as head_shapes
from hfstrat.strategies.lora import Lora
from hfstrat.strategies.partial import Partial
from hfstrat.trainer.distributed import DEEPSPEED, FSDP

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.tasks.base import Task
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer

THEN: dict[str, type[Strategy]] = {"partial": Partial, "lora": Lora, "full": Full}
EXACT_WEIGHTS, EXACT_PRODUCTS = 2_000_000, 10_000_000_000  # of the head; of rows x weights: what is solved in seconds


class Head(Strategy):
    """A classifier's head on pooled hidden states of one layer, or the LM head of a causal LM.

    With `then` the head is solved first and training goes on from it by another strategy: linear probing, then fine-tuning
    (LP-FT, Kumar et al. 2022, arXiv 2202.10054), which keeps a random head from spoiling the features.
    """

    name: Literal["head"]
    layer: int | Literal["auto"] = Field(
        "auto", description="After which block the body ends, from 1; auto: as a probe on training rows says"
    )
    pooling: Literal["auto", "mean", "last", "first"] = Field(
        "auto",
        description="How a text's hidden states become one: their mean, that of the last or the first token; auto: as the "
        "probe says",
    )
    head: Literal["linear", "mlp"] = Field("linear", description="A linear layer, or one hidden layer of GELUs before it")
    hidden_size: int = Field(256, ge=1, description="Width of the hidden layer of head: mlp")
    solver: Literal["auto", "exact", "trainer"] = Field(
        "auto",
        description="exact: a linear head's optimum in float64; trainer: step by step; auto: exact if that takes seconds",
    )
    l2: float | Literal["auto"] = Field(
        "auto", description="Penalty of the exact solver's squared weights, a row; auto: the best on held-out training rows"
    )
    untie: bool = Field(False, description="Give a causal LM whose head is its embeddings a head of its own, which learns")
    then: dict[str, Any] | None = Field(
        None,
        description="Strategy to go on with from the solved head: partial, lora or full, or a section such as {name: lora}",
    )
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(1e-3, "AdamW's own (arXiv 1711.05101); the features are standardised"),
    }

    @field_validator("layer", "l2")
    @classmethod
    def _positive(cls, value: int | float | str) -> int | float | str:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("a number above 0, or auto, is expected")
        return value

    @field_validator("then", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> Head:
        if self.head != "mlp" and self.hidden_size != type(self).model_fields["hidden_size"].default:
            raise ValueError("hidden_size: a linear head has no hidden layer; set head: mlp, or remove it")
        if self.head == "mlp" and self.solver == "exact":
            raise ValueError("solver: exact is for head: linear; an mlp is trained step by step")
        if self.l2 != "auto" and (self.head == "mlp" or self.solver == "trainer"):
            raise ValueError("l2 is the exact solver's; a head that is trained step by step has training.weight_decay")
        if self.then is not None:
            self._check_then()
        return self

    def _check_then(self) -> None:
        name = (self.then or {}).get("name")
        if name not in THEN:
            raise ValueError(f"then: given {name!r}; expected one of {', '.join(THEN)}, or a section with such a name")
        if self.head == "mlp" or self.solver == "trainer":
            raise ValueError("then needs head: linear and an exact solver: what transformers goes on with is a linear head")
        if self.pooling in ("mean", "first"):
            raise ValueError(
                f"then: no class of transformers pools by {self.pooling} at a chosen layer, so the classifier could not be "
                "trained on as a whole; remove pooling, or then"
            )
        try:
            self.continuation  # noqa: B018
        except ValidationError as error:
            from hfstrat.recipe import suggestions

            first = error.errors()[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                raise ValueError(f"then: {key}: {suggestions.unknown_key(('strategy', key), str(name))}") from None
            raise ValueError(f"then: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None

    @property
    def continuation(self) -> Strategy | None:
        """The strategy that goes on from the solved head, if there is one."""
        return None if self.then is None else THEN[self.then["name"]].model_validate(self.then)

    @property
    def unquantizable(self) -> str:  # type: ignore[override]
        return "" if self.continuation is None else self.continuation.unquantizable

    def learns_whole(self, names: list[str], tied: bool) -> set[str]:
        return set() if self.continuation is None else self.continuation.learns_whole(names, tied)

    def training_defaults(self) -> dict[str, Default]:
        further = self.continuation
        return self.defaults if further is None else further.defaults

    # before torch

    def check(self, task: Task) -> None:
        """Refuse what the task cannot have, and a result that could not be saved."""
        if task.unit == "token":
            odd = [
                key
                for key in ("layer", "pooling", "head", "hidden_size", "solver", "l2", "then")
                if key in self.model_fields_set
            ]
            if odd:
                raise UserError(f"strategy.{odd[0]}: the LM head of a causal LM stands on its last layer; remove it")
            return
        if self.untie:
            raise UserError("strategy.untie: a classifier's head is not tied to the embeddings; remove it")
        if self.then is None and not (self.pooling == "last" and self.head == "linear"):
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
        layer = None if self.layer == "auto" else self.layer
        if layer is not None:
            self.check_depth(head_shapes.depth_of(shapes))
        classifier = head_shapes.classifier_of(shapes)
        if classifier is None:
            return self._of_language_head(shapes, tied)
        if (further := self.continuation) is not None:
            return further.footprint(head_shapes.cut(shapes, layer), tied)
        hidden = self.hidden_size if self.head == "mlp" else None
        head = head_shapes.head_size(shapes, classifier, hidden, reads_last=self.pooling == "last")
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

    def check_depth(self, depth: int) -> None:
        """Raises UserError where the layer is beyond the last."""
        if self.layer != "auto" and self.layer > depth:
            raise UserError(f"strategy.layer: given {self.layer}, but this model has {depth} layers")

    def _of_language_head(self, shapes: Shapes, tied: bool) -> Footprint:
        total = sum(prod(shape) for shape in shapes.values())
        head = sum(prod(shape) for name, shape in shapes.items() if HEAD.search(name))
        if tied:
            self._check_tied()
            head = sum(prod(shape) for name, shape in shapes.items() if EMBEDDING.search(name))
            total += head
        return Footprint(head, total)

    def _check_tied(self) -> None:
        if not self.untie:
            raise UserError(
                "strategy.untie: this model's LM head is its input embeddings (tie_word_embeddings), so it cannot learn alone; "
                "untie: true gives it a head of its own, for as many parameters more. Or take partial, lora or full"
            )

    # with torch

    def prepare_base(self, base: Base, data: TrainData) -> TrainData:
        if base.model.get_output_embeddings() is not None:
            return data
        from hfstrat.strategies.head.heads import classifier_head

        return classifier_head(self, base, data)

    def build_model(self, base: Base) -> nn.Module:
        if (further := self.continuation) is not None:
            return further.build_model(base)
        if base.prepared is not None:
            model: nn.Module = base.prepared.model
            return model
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

            strength = None if self.l2 == "auto" else float(self.l2)
            return SolvedTrainer(strength, **arguments)
        return super().build_trainer(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        if (further := self.continuation) is not None:
            further.finish(model, base)
        elif base.prepared is not None:
            base.prepared.publish()
        else:
            from hfstrat.models.load import cast_weights

            cast_weights(model, base.compute_dtype)  # the frozen weights were rounded to it

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        further = self.continuation
        return 12 * footprint.trainable if further is None else further.checkpoint_bytes(footprint)

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        if (further := self.continuation) is not None:
            further.save(trainer, folder, base)
        elif base.prepared is None:
            super().save(trainer, folder, base)
        elif trainer.args.should_save:
            base.prepared.save(trainer, folder)
