"""The base class of strategies. A strategy takes its section of the recipe and lives for one run; no torch up here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from hfstrat.recipe.section import Shapes
from hfstrat.recipe.strategies import StrategySection

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.load import Loaded
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.base import Task
    from hfstrat.trainer.baselines import Baselines
    from hfstrat.trainer.plan import Plan
    from hfstrat.trainer.train_data import TrainData
    from hfstrat.trainer.trainer import StrategyTrainer


class Footprint(NamedTuple):
    """Parameter counts: those that learn, and all that sit in memory (adapters included)."""

    trainable: int
    total: int


class Learning(NamedTuple):
    """What a strategy does with a model, as far as memory and time go; see `hfstrat.advisor`.

    `names` are the model's own parameters that learn, `shapes` those of the model that is trained, `rank` that of the adapters
    beside those in `adapted`. `body_once`: the body runs once and what it says is kept. `keeps_prefix`: what the blocks below
    the lowest learning one say may be kept too, if they have no dropout or it is off (`still`). `teacher`: the parameters of a
    frozen model beside it.
    """

    names: frozenset[str]
    shapes: Shapes
    rank: int = 0
    adapted: frozenset[str] = frozenset()
    body_once: bool = False
    keeps_prefix: bool = False
    still: bool = False
    teacher: int = 0


S = TypeVar("S", bound=StrategySection)


class Strategy(ABC, Generic[S]):
    """A way of training, by its section of the recipe."""

    def __init__(self, section: S) -> None:
        self.section = section

    def check_model(self, recipe: Recipe, network: bool) -> Footprint | None:
        """Refuse what cannot become a model, before torch; the footprint where it can be told."""
        from hfstrat.strategies import check_model as strategies_check_model

        return strategies_check_model.check_pretrained(self, recipe, network)

    def load_tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """The tokenizer of the run: by default that of `model:`."""
        from hfstrat.models import load

        return load.load_tokenizer(recipe.model)

    def load_base(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> Base:
        """Where do the weights come from? By default they are those of `model:`."""
        from hfstrat.tasks import TASKS, loading

        return loading.load_base(recipe.model, tokenizer, TASKS[recipe.task], data, self.learns_whole)

    def learns_whole(self, names: list[str], tied: bool) -> set[str]:
        """Which of the base's own parameters learn, by name: those cannot be quantized. By default none."""
        return set()

    def baselines(self, data: PreparedData, plan: Plan, model: nn.Module) -> Baselines | None:
        """What has to be beaten for the result to be worth anything; None where the metrics before training say it."""
        return None

    def check(self, task: Task) -> None:
        """Refuse settings that do not go together with the task, before torch. Raises UserError."""

    def check_quantized(self) -> None:
        """Refuse settings that change the weights of a base that is quantized. Raises UserError."""

    def check_wrapping(self, wrapping: str) -> None:
        """Refuse what cannot be learnt where no process has the whole model, before it is loaded.

        Args:
            wrapping: alone, ddp, fsdp or deepspeed (`hfstrat.trainer.distributed`).

        Raises:
            UserError: what would work.
        """

    def prepare_base(self, base: Base, data: TrainData) -> TrainData:
        """What has to be known of the data before the model can be built? By default nothing."""
        return data

    def rewrite(self, data: PreparedData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, screen: Console) -> PreparedData:
        """Other rows to train on than those that were read? By default the same."""
        return data

    @abstractmethod
    def build_model(self, base: Base) -> nn.Module:
        """Decide which of the loaded base model's weights learn; return the model to train."""

    @abstractmethod
    def footprint(self, shapes: Shapes, tied: bool) -> Footprint:
        """How many parameters learn and how many only sit in memory, without torch.

        Args:
            shapes: the base model's parameters.
            tied: whether the output head shares the input embeddings' weight.
        """

    def learning(self, shapes: Shapes, tied: bool) -> Learning:
        """Which parameters learn, without torch; by default all of them. Arguments are those of `footprint`."""
        return Learning(frozenset(shapes), shapes)

    def asked(self, base: Base) -> list[Any]:
        """Other causal LMs that are given the batches of the run? By default none."""
        return []

    def prepare_data(self, data: TrainData, model: nn.Module) -> TrainData:
        """What can be computed once before training? By default nothing."""
        return data

    def build_trainer(self, **arguments: Any) -> StrategyTrainer:
        """What is minimised? By default the task's own loss."""
        from hfstrat.trainer.trainer import StrategyTrainer

        kind: type[StrategyTrainer] = arguments.pop("trainer_class", StrategyTrainer)
        return kind(**arguments)

    def finish(self, model: nn.Module, base: Base) -> None:
        """Bring the trained weights into the precision they are published in, before the last evaluation."""

    def compare(self, loaded: Loaded, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
        """What the result has to be compared with, once it is saved and the memory is free; by default nothing.

        Args:
            facts: the report's `result` so far.
            folder: of the result.

        Returns:
            For the report; its `lines` are shown with the summary.
        """
        return {}

    def checkpoint_bytes(self, footprint: Footprint) -> int:
        """Bytes of one checkpoint: all weights, and for what learns its float32 copy and two Adam moments."""
        return 2 * footprint.total + 12 * footprint.trainable

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        """Write what is worth keeping, loadable by plain transformers or peft."""
        trainer.save_model(str(folder))
        if trainer.args.should_save:
            # transformers adds the pickled arguments; they name local paths and load only with this code
            (folder / "training_args.bin").unlink(missing_ok=True)
