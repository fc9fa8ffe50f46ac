"""The stages of a run that a strategy decides, and their defaults. A strategy takes its section of the recipe and lives for
one run, so it may hold what it has built. torch is imported inside the methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from hfstrat.models.load import read_config
from hfstrat.objectives import task_of
from hfstrat.recipe.section import Shapes
from hfstrat.recipe.strategies import StrategySection
from hfstrat.strategies import checks
from hfstrat.strategies.description import Description
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import ALONE

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData as Data
    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.load import Loaded
    from hfstrat.recipe.schema import Model, Recipe
    from hfstrat.tasks.report import Result
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer

S = TypeVar("S", bound=StrategySection)


class Built(NamedTuple):
    """The model to train, its data, and further models that are given the same batches, such as a teacher."""

    model: nn.Module
    data: TrainData
    others: tuple[PreTrainedModel, ...] = ()


@dataclass
class Prepared:
    """The data with cached columns, and what the Trainer is created with in addition to the run's own arguments."""

    data: TrainData
    trainer_class: Callable[..., StrategyTrainer] | None = None  # None is StrategyTrainer
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=list)


class Strategy(ABC, Generic[S]):
    """A way of training. The methods are called in this order."""

    has_pretrained_body: ClassVar[bool] = False  # and trains it, so that a head on the frozen body is a baseline

    def __init__(self, section: S) -> None:
        self.section = section

    # before torch is imported

    def check_task(self, task: Task) -> None:
        """Refuse settings that do not suit the task. Raises UserError."""

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        """Refuse what cannot work: settings, the launch, the model's files.

        Args:
            wrapping: how processes share the model: alone, ddp, fsdp or deepspeed (`hfstrat.trainer.distributed`).
            network: whether the Hub may be queried.

        Raises:
            UserError: one sentence that begins with the key.
        """
        self.check_task(TASKS[recipe.task])
        checks.check_pretrained(recipe, network)
        checks.check_quantization(recipe, self.describe)

    def model_of(self, recipe: Recipe) -> Model:
        """The section of the model as this strategy reads it."""
        return recipe.model

    def shapes(self, recipe: Recipe, labels: int = 2) -> tuple[Shapes, bool] | None:
        """The parameters of the model, and whether its head is tied; None where they are unknown before loading.

        Args:
            labels: the number of labels in the data, which gives the size of a classifier's head.
        """
        config = read_config(recipe.model) or {}
        self.set_family(str(config.get("model_type", "")), TASKS[recipe.task].text.generates)
        return checks.pretrained_shapes(recipe, labels, self.model_of(recipe))

    def new_config(self, recipe: Recipe) -> tuple[str, dict[str, Any]] | None:
        """The family and the keys of the config of a model with random weights; None where it has none, or needs torch.

        Raises UserError: no such family or size.
        """
        return None

    def set_family(self, family: str, generates: bool) -> None:
        """Note the model's family and whether it has an LM head, on which `describe` may depend; before `describe`."""

    @abstractmethod
    def describe(self, shapes: Shapes, tied: bool) -> Description:
        """What is trained in a model.

        Args:
            shapes: the base model's parameters.
            tied: whether the output head shares the weight of the input embeddings.
        """

    # the run

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """The tokenizer of the run, or the processor in its place; by default that of `model:`."""
        return task_of(recipe).rows.load_processor(recipe)  # type: ignore[no-any-return]

    def read(self, recipe: Recipe, screen: Console | None = None) -> tuple[PreTrainedTokenizerBase, Data]:
        """The tokenizer and the tokenized data.

        Args:
            screen: for the output of a run; None where the data are only looked at, and no model is run over them.
        """
        from hfstrat.data.splits import held_out

        task, wanted, tokenizer = task_of(recipe), recipe.evaluation, self.load_tokenizer(recipe)
        held = held_out(recipe, task.rows.reader)
        return tokenizer, task.rows.prepare(recipe.data, tokenizer, recipe.seed, wanted.rows_to_answer, wanted.max_rows, held)

    def load(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data | None) -> Base:
        """The base model; by default the weights of `model:`."""
        from hfstrat.tasks import loading

        return loading.load_base(
            self.model_of(recipe), tokenizer, TASKS[recipe.task], data, lambda *shapes: self.describe(*shapes).unquantized
        )

    @abstractmethod
    def build_model(self, base: Base) -> nn.Module:
        """The model to train, with `requires_grad` set; called by `build`, and alone where no data are at hand."""

    def build(self, base: Base, data: TrainData) -> Built:
        """The model to train, for these data."""
        return Built(self.build_model(base), data)

    def prepare(self, model: nn.Module, data: TrainData) -> Prepared:
        """What is computed once before training, and what the Trainer needs. The sizes of batches are known by now."""
        if not getattr(data.collate, "reads_images", False):
            return Prepared(data)
        from hfstrat.strategies.frozen.vision import cache_features

        return Prepared(cache_features(data, model))

    def finish(self, model: nn.Module, base: Base) -> None:
        """Bring the trained weights into the precision they are published in, before the last evaluation."""

    def published(self, model: nn.Module, base: Base) -> nn.Module:
        """The model that is saved, after `finish`: the numbers of the report are measured on it."""
        if base.pooling is None:
            return model
        from hfstrat.strategies.pooled_result import complete

        return complete(model, base)

    @property
    def predicts_out_of_fold(self) -> bool:
        """Whether `out_of_fold` predicts training examples, so that none have to be held out to choose thresholds."""
        return False

    def out_of_fold(self, trainer: StrategyTrainer) -> tuple[np.ndarray, np.ndarray] | None:
        """Outputs `[n, K]` for training examples by models that were fitted on others, and their labels; None without any."""
        return None

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        """Write the result, so that plain transformers, PEFT or sentence-transformers loads it."""
        if base.pooling is not None:
            from hfstrat.strategies import pooled_result

            pooled_result.save(trainer, folder, base)
            return
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            # transformers adds the pickled arguments; they name local paths and load only with this code
            (folder / "training_args.bin").unlink(missing_ok=True)

    def after(self, loaded: Loaded, result: Result, folder: Path) -> dict[str, Any]:
        """Comparisons to make once the result is saved and its memory is free; empty by default.

        Args:
            result: of the report, so far.
            folder: of the result.

        Returns:
            For the report; its `lines` are shown with the summary.
        """
        return {}

    # the page of a run

    def sections(self, result: Result) -> list[Section]:
        """What the page of a run shows of this strategy beside what it shows of all."""
        return []

    def advice(self, result: Result) -> list[tuple[str, str]]:
        """What to try next as this strategy sees it: sentences, each with a command or a setting, or "" without one."""
        return []
