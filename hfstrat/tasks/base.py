"""What a task has to answer: which weights are loaded, what a row is, what is minimised, measured, compared and shown.

Nothing outside this package asks which task it is. torch is imported inside the methods: the command line reads these files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.metrics import Score

Metrics = dict[str, float]


class Quality(NamedTuple):
    """What runs are compared by: the sum of `above` over the sum of `below`, columns of `evaluation_rows`."""

    metric: str
    higher_is_better: bool
    above: str
    below: str


class Task(ABC):
    """One task. Its objects hold nothing: what depends on the data comes with the data."""

    name: str
    peft_type: str  # of PEFT's TaskType
    auto_class: str  # of transformers
    architecture: str  # how the names of this task's model classes end
    pipeline: str  # the Hub's name for the task
    unit: str  # what a prediction is of
    metrics: tuple[str, ...]  # that the report holds
    framed: bool  # whether a text stands between special tokens
    quality: Quality
    lacking: str  # what it means that weights are missing
    shares: tuple[str, ...] = ()  # metrics that are a share of right rows
    generates: bool = False  # whether it answers in words

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Our names of columns that rows of this task may have."""

    @property
    @abstractmethod
    def reader(self) -> Callable[..., Any]:
        """How rows are read, from the first of them, the source's name, the format and the columns that are wanted."""

    # before torch

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Refuse settings that this task cannot have. Raises UserError."""

    @abstractmethod
    def told(self, head: list[dict[str, Any]], source: str, data: Data, wanted: str, columns: dict[str, str]) -> Any:
        """How rows are read, told from the first of them: an object with `example(row)` and `where(index)`."""

    @abstractmethod
    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        """Refuse a local model that is nothing for this task, by its config.json. Raises UserError."""

    @abstractmethod
    def shapes(self, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> tuple[dict[str, Any], bool] | None:
        """The parameters of the model that will be trained, and whether its head is tied; None if that cannot be told.

        Args:
            shapes: those of the checkpoint.
            labels: how many labels the data have (0 where there are none).
        """

    # data

    @abstractmethod
    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> PreparedData:
        """The rows of a run, tokenised; see `hfstrat.data`. `held_out` are hashes of texts, where that was decided before."""

    @abstractmethod
    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        """Rows to a batch whose `labels` are what `loss` takes."""

    @abstractmethod
    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        """A row of this length that costs as much as any."""

    # model

    def config_options(self, data: PreparedData | None, tokenizer: Any) -> dict[str, Any]:
        """Values for the model's config, beside what its checkpoint says."""
        return {}

    @abstractmethod
    def check_config(self, name: str, config: Any) -> None:
        """The same as `check_architecture` with a loaded config. Raises UserError."""

    def new_weights(self, model: Any, missing: list[str]) -> tuple[list[str], list[str]]:
        """Modules that are the head and learn whole (names), and those of `missing` that may not be missing."""
        return [], missing

    @abstractmethod
    def adapt(self, base: Base, tokenizer: Any) -> None:
        """What else the loaded model needs for this task."""

    @abstractmethod
    def own_the_loss(self, base: Base) -> None:
        """Bind a forward that computes the loss, if this task has one; called before anything wraps the model."""

    # training and evaluation

    @abstractmethod
    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The micro-batch's loss, over the items of the whole optimiser step."""

    @abstractmethod
    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """What an evaluation keeps of each row of a batch: tensors whose first dimension is the rows."""

    @abstractmethod
    def measure(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...]) -> tuple[Metrics, dict[str, Any]]:
        """Metrics of all rows' sums (with `loss`, by which the best weights are chosen), and details for the report."""

    @abstractmethod
    def score(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...], beside: dict[str, np.ndarray]) -> Score:
        """The same metrics from how often each row counts, for confidence intervals.

        Args:
            beside: what else is known of each row, such as its `bytes`.
        """

    @abstractmethod
    def held(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        """The rows of `data.train` to evaluate a trained model on, as training would have had them: nothing is held out.

        Args:
            config: the model's.
        """

    @abstractmethod
    def of_rows(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """The sums as columns, `[rows]` each: `nll` (nats) over `items`, `right` of `items`, and what else tells a row."""

    @abstractmethod
    def said(self, metrics: Metrics) -> str:
        """Metrics in words."""

    @abstractmethod
    def compared(self, before: Metrics, after: Metrics) -> str:
        """What training changed beside the loss, in words."""

    def table(self, details: dict[str, Any]) -> list[str]:
        """Details in a few lines."""
        return []

    # what the model says

    @abstractmethod
    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        """Inputs of a forward pass, for comparing models: what they say to it is `logits`."""

    @abstractmethod
    def answer(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        """What the model says to one prompt."""

    @abstractmethod
    def prompt_text(self, prompt: Any) -> str:
        """A prompt in words."""

    # the artefact

    @abstractmethod
    def example(self, chats: bool, sentence: bool) -> list[str]:
        """Lines of Python that ask a loaded `model` (with its `tokenizer`) something.

        Args:
            chats: prompts go through the chat template.
            sentence: `model` is one of sentence-transformers.
        """

    @abstractmethod
    def write_config(self, base: Base, folder: Path) -> None:
        """Write beside an adapter what its base does not know."""

    def load_options(self, folder: str) -> dict[str, Any]:
        """Keywords for loading the base of an adapter in `folder`."""
        return {}
