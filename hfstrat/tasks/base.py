"""What a task declares: four objects, one for each question that the rest of the code has about it.

`rows`: what an example is and how it becomes a batch. `model`: which class of transformers, and its config and head.
`metrics`: what is minimized, measured and compared. `text`: predictions, metrics and code as they are shown.
Nothing outside this package asks which task it is. Only annotations name torch here: the command line imports these files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from hfstrat.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.models.pooling import Pooling
    from hfstrat.models.stack import Stack
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.data import Data, Source
    from hfstrat.recipe.schema import Model as ModelSection
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.report import Result

Values = dict[str, float]
"""Metrics by name."""

Score = Callable[[Any], dict[str, float]]
"""From how often each row counts (an array `[rows]` of numbers of at least 0) to metrics by name."""


class Quality(NamedTuple):
    """The metric by which runs are compared: the sum of `above` over the sum of `below`, columns of `Metrics.columns`."""

    metric: str
    higher_is_better: bool
    above: str
    below: str


class Wrong(NamedTuple):
    """An evaluation example whose prediction is wrong."""

    place: int  # among the evaluation examples
    expected: str
    predicted: str
    score: float | None = None  # the probability of what is expected, or the absolute error of a number


class Pictures(NamedTuple):
    """JPEG pictures of a run as data URIs, where text does not show its examples; "" for a missing one."""

    sheet: str = ""  # the first training examples as the model is given them
    answers: tuple[str, ...] = ()  # of the prompts of `Result.answers`
    mistakes: tuple[str, ...] = ()  # of `Result.mistakes`
    examples: tuple[str, ...] = ()  # of the training examples in `DataStatistics.shown`, beside their text

    def of_answer(self, place: int) -> str:
        return self.answers[place] if place < len(self.answers) else ""

    def of_mistake(self, place: int) -> str:
        return self.mistakes[place] if place < len(self.mistakes) else ""

    def of_example(self, place: int) -> str:
        return self.examples[place] if place < len(self.examples) else ""


class Given(ABC):
    """What a model is given of files, from its configs alone: what predictions need. No torch.

    sections: of the recipe, such as `{"image": {"image_size": 98}}`, that give the model just this.
    """

    sections: dict[str, Any]

    @abstractmethod
    def header(self, ref: Any) -> Any:
        """The size of a file (a `MediaRef`), as far as possible without decoding it. Raises Unreadable."""

    @abstractmethod
    def decode(self, ref: Any) -> None:
        """Decode a file and bring it to the size of the model, as batches do. Raises Unreadable."""

    @abstractmethod
    def positions(self, header: Any) -> int:
        """Positions of the blocks for a file."""

    @abstractmethod
    def lines(self, headers: list[Any]) -> list[str]:
        """What the files are like, what the model is given of them, and what may be wrong with that, in words."""

    def fitted(self, headers: list[Any]) -> Given:
        """The same with settings proposed for these files, where the recipe has none."""
        return self

    @abstractmethod
    def scratch(self, headers: list[Any], parameters: float) -> tuple[Given, str, dict[str, Any]]:
        """A model with random weights for these files: what it is given, its family, and keys of its config.

        Args:
            parameters: about as many.
        """


class Rows(ABC):
    """The examples of a task: how they are read, prepared and collated."""

    columns: list[str]  # our names of the columns that an example may have
    noun: str = "sequence"  # for an example in a line about batches
    framed: bool  # whether a text is between special tokens
    kind: Any = None  # of the files that are examples (`hfstrat.data.media_files.Kind`), where they are files
    streams: bool = False  # whether they may be read while training (`data.streaming`)
    answered_at_once: int = 0  # examples of an evaluation pass, where the model answers them; 0: it only reads them

    def load_processor(self, recipe: Recipe, family: str = "") -> Any:
        """What turns examples into inputs of the model: a tokenizer, or a processor in its place.

        Args:
            family: of a model with random weights.

        Raises:
            UserError: it cannot be loaded.
        """
        from hfstrat.models import load

        return load.load_tokenizer(recipe.model)

    def load_trained(self, folder: str, recipe: Recipe | None = None) -> Any:
        """The tokenizer or processor that is saved with a result.

        Args:
            recipe: of the run.
        """
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    def check_processor(self, model: ModelSection, network: bool) -> None:
        """Refuse a model without the files of its tokenizer or processor, before torch. Raises UserError."""
        from hfstrat.models import check

        check.check_tokenizer(model, network)

    def has_processor(self, folder: Path) -> bool:
        """Whether a folder has the files of a tokenizer or processor."""
        from hfstrat.models import check

        return check.has_tokenizer(folder)

    def same_inputs(self, one: Any, other: Any) -> bool:
        """Whether two tokenizers or processors give the same inputs for an example."""
        return bool(one.get_vocab() == other.get_vocab())

    def check_source(self, source: Source, data: Data, key: str) -> bool:
        """Refuse a source that does not exist or cannot be read, before torch, where this task reads others than all tasks do.

        Returns:
            Whether it was checked here.

        Raises:
            UserError: it cannot be read.
        """
        return False

    def digest(self, source: Source, data: Data, key: str) -> str:
        """A hash of what the rows of a local source are read from, where this task reads others than all tasks do; else ""."""
        return ""

    def given(self, config: dict[str, Any], shapes: dict[str, Any], processor: dict[str, Any], recipe: Recipe) -> Given:
        """What a model is given of files, for predictions; where examples are files.

        Args:
            config, shapes: of the model.
            processor: the config of its image processor or feature extractor, empty where it has none.

        Raises:
            UserError: settings that do not fit the model.
        """
        raise NotImplementedError

    def files(self, targets: Iterable[str]) -> list[Any]:
        """The files to predict of, from paths of files and folders, where examples are files; else none. Raises UserError."""
        return []

    def as_text(self, row: dict[str, Any], tokenizer: Any, most: int | None = None) -> str:
        """A prepared example of a task with a head as the model is given it, in words; of a longer text `most` tokens."""
        more = 0 if most is None else len(row["input_ids"]) - most
        return f"{tokenizer.decode(row['input_ids'][:most])}" + (f" ... {more} more tokens" if more > 0 else "")

    def size_of(self, row: dict[str, Any]) -> str:
        """The size of a prepared example, in words."""
        return f"{row['length']} tokens"

    def draw(self, data: PreparedData, file: Path) -> str:
        """Draw the first training examples into a picture, where text does not show them; returns a line about it, or ""."""
        return ""

    def sheet(self, data: PreparedData) -> bytes:
        """The same picture as a JPEG, for a page; b"" where text shows examples."""
        return b""

    def picture(self, example: Any) -> bytes:
        """A small JPEG of a prepared example or of a prompt; b"" where text shows all of it."""
        return b""

    @property
    @abstractmethod
    def reader(self) -> Callable[..., Any]:
        """The function that `read_format` calls: from first rows, source name, format and columns to a reading."""

    def read_format(
        self,
        head: list[dict[str, Any]],
        source: str,
        data: Data,
        wanted: str = "auto",
        columns: dict[str, str] | None = None,
        class_names: dict[str, list[str]] | None = None,
    ) -> Any:
        """How rows are read (a `Reading` with `example(row)`), detected from the first of them.

        Args:
            class_names: of label ids, by column, where the source has some.

        Raises:
            UserError: columns that fit no format of this task.
        """
        return self.reader(head, source, wanted, columns or {}, class_names)

    def fits(self, reading: Any, head: list[dict[str, Any]]) -> bool:
        """Whether first rows whose columns fit also have values of this task, for detecting it."""
        return True

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
        """The tokenized training and evaluation examples of a run.

        Args:
            samples: evaluation examples to keep as prompt and reference.
            max_eval_rows: evaluation examples, at most.
            held_out: hashes of the texts to evaluate on, where they were chosen before there was a tokenizer.

        Raises:
            UserError: data that cannot be read, or that this task cannot be trained on.
        """

    @abstractmethod
    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        """All examples of `data.train`, for evaluating a trained model with this `config`; none is held out."""

    @abstractmethod
    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        """The function from examples to a batch, whose `labels` are what `Metrics.loss` takes."""

    @abstractmethod
    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        """An example of this length that costs as much memory as any."""

    def check_sharded(self, data: Any) -> None:
        """Refuse data on which processes with shards of the model would wait for each other forever. Raises UserError."""
        return

    def longest(self, data: PreparedData) -> int:
        """Tokens of the longest sequence that a model is given."""
        return int(max(data.lengths.max(), data.eval_lengths.max()))

    @property
    def answer_tokens(self) -> int:
        """Tokens of `longest` that the model generates."""
        return 0

    def sizes(self, data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a forward pass for each training and each evaluation example."""
        return data.lengths, data.eval_lengths

    def renderer(self, tokenizer: Any, template: str, options: Mapping[str, Any] | None = None) -> Any:
        """What turns prompts into token ids.

        Args:
            template, options: as for `data.render.Renderer`.
        """
        from hfstrat.data.render import Renderer

        return Renderer(tokenizer, template, options=options)

    def shown(self, row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """A sequence of an example as it is shown to people, where single tokens of it mean nothing to them."""
        return row

    def note(self, row: dict[str, Any]) -> str:
        """What to show below the tokens of an example; empty for nothing."""
        return ""

    def parts(self, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """The sequences of an example with their names, for showing them; one without a name where it is the example."""
        return [("", row)]

    def inputs_of(self, data: PreparedData, row: dict[str, Any], most: int) -> dict[str, Any]:
        """The inputs of a forward pass for one evaluation example, of at most `most` tokens; empty where it has none."""
        import torch

        part = self.parts(row)[0][1]
        return {name: torch.tensor([part[name][:most]]) for name in ("input_ids", "token_type_ids") if part.get(name)}

    @abstractmethod
    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        """Inputs of a forward pass on which models are compared by their `logits`."""


class Model(ABC):
    """The models of a task: their class in transformers, what their config needs, and their head."""

    peft_type: str | None  # of PEFT's TaskType; None where PEFT has none for it
    reads_tokens: bool = True  # whether inputs are token ids of a vocabulary
    sees_images: bool = False  # whether inputs have pixels
    has_predicted_costs: bool = True  # whether `advise` and `tune` predict its memory and time
    costs_unknown: str = ""  # why not, as a sentence
    auto_class: str  # of transformers
    architecture: str | tuple[str, ...]  # the ends of the names of this task's model classes
    random_family: str = "llama"  # of a model with random weights, unless the recipe names one
    config_keys: tuple[str, ...] = ()  # what a config has to hold of the data
    if_missing: str  # what it means where a checkpoint lacks weights
    head_share: float = 1.0  # learning rate of a new head as a multiple of that of the other weights

    @abstractmethod
    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        """Refuse a local model that cannot be used for this task, by its config.json. Raises UserError."""

    @abstractmethod
    def check_config(self, name: str, config: Any) -> None:
        """The same with a loaded config. Raises UserError."""

    def stack(self, name: str, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> Stack:
        """The model as a stack of blocks over positions, for predictions; of models that read files.

        Args:
            shapes: of the checkpoint.
            labels: outputs of the head.

        Raises:
            UserError: a model whose memory and time cannot be derived from its shapes.
        """
        raise NotImplementedError

    @abstractmethod
    def shapes(
        self, shapes: dict[str, Any], config: dict[str, Any], labels: int, pooled: bool = False
    ) -> tuple[dict[str, Any], bool] | None:
        """The parameters of the model that will be trained, and whether its head is tied; None where they are unknown.

        Args:
            shapes: those of the checkpoint.
            labels: outputs of the head (0 where there is none).
            pooled: whether `pooling` finds one.
        """

    def pooling(self, model: ModelSection, config: dict[str, Any]) -> tuple[Pooling | None, dict[str, Any]]:
        """The pooling of a model where the class of transformers has another one, and keys for the config of that class."""
        return None, {}

    def fits(self, config: dict[str, Any]) -> bool:
        """Whether the config.json of a model of this task's class is for this task, where several share a class."""
        return True

    def config_options(self, data: PreparedData | None, tokenizer: Any) -> dict[str, Any]:
        """Values that the task sets in the model's config."""
        return {}

    def random_inputs(self, family: str, recipe: Recipe) -> dict[str, Any]:
        """Keys of the config of a model with random weights that the recipe sets by the size of its inputs. No torch."""
        return {}

    def random_config(self, family: str, settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """The settings of the config of a model with random weights."""
        from hfstrat.models.random_init import token_ids

        return {**settings, **token_ids(tokenizer)}

    def stored_outputs(self, config: Any, pooling: Pooling | None = None) -> dict[str, Any]:
        """The part of `config_options` that a checkpoint's config replaces while its weights are loaded."""
        return {}

    def fit_outputs(self, base: Base, config: Any, data: PreparedData | None) -> None:
        """Give the head of a loaded checkpoint the outputs of the data, in place, and say what that changes.

        Args:
            config: of the checkpoint.
        """
        return

    def fit_adapter(self, base: Base, source: str) -> Callable[[Any], None]:
        """Prepare the base for loading an adapter whose head has outputs of its own.

        Returns:
            What gives the head of the model with the adapter the outputs of the data.
        """
        return lambda model: None

    def freeze(self, base: Base, roles: list[str] | None) -> None:
        """Freeze parts of a model of which all parameters are trained, in place.

        Args:
            roles: vision, projector or language; None: those that this task freezes by default.
        """
        return

    def frozen_modules(self, base: Base, roles: list[str] | None) -> Callable[[str], bool]:
        """Whether a module, by its name, gets no adapter, since its part is frozen (see `freeze`)."""
        return lambda name: False

    def has_language(self, base: Base) -> Callable[[str], bool]:
        """Whether a parameter, by its name, is of the stack of blocks that is trained from its end."""
        return lambda name: True

    def split_missing(self, model: Any, missing: list[str]) -> tuple[list[str], list[str]]:
        """The modules that are a trainable head, by name, and those of `missing` that the checkpoint has to have."""
        return [], missing

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Change the loaded model for this task, in place."""
        return

    def bind_loss(self, base: Base) -> None:
        """Bind a forward that computes the loss, if this task has one; called before anything wraps the model."""
        return

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None] | None:
        """Fit the output layer to the targets of training, in place, before the model to train is built.

        Returns:
            What undoes it before the result is saved; None where nothing was changed.
        """
        return None

    def check_teacher(self, teacher: Any, section: Any, processor: Any) -> None:
        """Refuse a teacher that takes other inputs than the student, and fit it to their size. Raises UserError.

        Args:
            section: of the teacher.
            processor: of the student; a tokenizer that gives both the same tokens is checked elsewhere.
        """
        return

    def write_config(self, base: Base, folder: Path) -> None:
        """Write alongside an adapter what its base model does not hold."""
        return

    def ready(self, model: Any) -> None:
        """Change a result that was loaded for inference, in place, where batches need it."""
        return

    def load_options(self, folder: str) -> dict[str, Any]:
        """Keywords for loading the base model of an adapter in `folder`."""
        return {}


@dataclass(frozen=True)
class Metrics(ABC):
    """What is minimized and measured. `for_data` binds it to the data of a run; unbound it knows no labels."""

    labels: tuple[str, ...] = ()  # names of the outputs of a head

    names: ClassVar[tuple[str, ...]]  # of the metrics in the report
    of_distributions: ClassVar[bool] = True  # whether outputs are logits
    can_overfit: ClassVar[bool] = True  # whether training and evaluation have the same loss
    has_baselines: ClassVar[bool] = True  # whether a task with a head has a constant prediction and a linear head to beat
    of_tokens: ClassVar[bool] = False  # whether the loss is per token of the examples
    shares: ClassVar[tuple[str, ...]] = ()  # metrics that are a share of correct examples

    @property
    @abstractmethod
    def quality(self) -> Quality:
        """The metric by which the best weights are chosen and runs are compared."""

    def for_data(self, data: PreparedData) -> Self:
        """These metrics for the labels of this data."""
        return replace(self, labels=data.label_names)

    def for_training(self, recipe: Recipe, data: PreparedData) -> Self:
        """These metrics with the loss that the recipe sets, where it weights examples. Raises UserError."""
        if recipe.training.class_weights is not None:
            raise UserError(f"training.class_weights: it is for classifiers; remove it for task: {recipe.task}")
        return self

    @abstractmethod
    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a micro-batch, summed and divided by the items of the complete optimizer step."""

    def row_weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """How much each example counts in the training loss, `[n]`, by its label; None: equally."""
        return None

    @abstractmethod
    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """What an evaluation keeps of each example of a batch: tensors whose first dimension is the examples."""

    def thresholds(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Keys of the config with what turns outputs into predictions, chosen on examples that were held out of training.

        Args:
            outputs: of the model, `[n, K]`.
            labels: as in a batch, `[n, K]`.
        """
        return {}

    @abstractmethod
    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        """Metrics over all examples (with `loss`), and details for the report."""

    def mistakes(self, sums: tuple[np.ndarray, ...], most: int) -> list[Wrong]:
        """The evaluation examples that are most wrong, the worst first; none where predictions are not right or wrong."""
        return []

    @abstractmethod
    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        """The same metrics as a function of how often each example counts, for confidence intervals.

        Args:
            extra: other columns of the examples, such as their `bytes`.
        """

    @abstractmethod
    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """The sums as columns, `[examples]` each: `nll` over `items`, and what else compares two runs example by example."""


class Text(ABC):
    """What is shown to people: predictions, metrics in words, code."""

    pipeline: str  # the Hub's name for the task
    unit: str  # what a prediction is made of or for: token, text
    generates: bool = False  # whether predictions are generated text
    processor: tuple[str, str] = ("tokenizer", "AutoTokenizer")  # of inputs: its name in code, and its class in transformers

    @property
    def loss_unit(self) -> str:
        """The unit of the loss."""
        return f"nats per {self.unit}"

    @abstractmethod
    def predict(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        """The prediction for one prompt, as text."""

    @abstractmethod
    def prompt(self, prompt: Any) -> str:
        """A prompt as text."""

    @abstractmethod
    def metrics(self, metrics: Values) -> str:
        """Metrics in a line."""

    @abstractmethod
    def change(self, before: Values, after: Values) -> str:
        """What training changed, apart from the loss, in a line."""

    def details(self, details: dict[str, Any]) -> list[str]:
        """The details of an evaluation in a few lines."""
        return []

    def sections(self, result: Result, pictures: Pictures) -> list[Section]:
        """What the page of a run shows of this task beside what it shows of all."""
        return []

    def advice(self, result: Result) -> list[tuple[str, str]]:
        """What to try next as this task sees it: sentences, each with a command or a setting, or "" without one."""
        return []

    def target(self, value: Any, names: tuple[str, ...]) -> str:
        """What a prepared example of a task with a head is trained to predict, in words."""
        raise NotImplementedError

    def agreement(self, name: str, one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
        """How the outputs `[..., K]` of a model and of the one merged from it differ, for the same inputs: here logits."""
        pairs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(one, other, strict=True)]
        divergence = sum((a.exp() * (a - b)).sum().item() for a, b in pairs)
        same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in pairs)
        count = sum(a.shape[:-1].numel() for a, _ in pairs)
        return (
            f"KL({name} || merged) = {divergence / count:.2e} nats per {self.unit}; "
            f"the same top prediction for {same / count:.2%} of {count}"
        )

    @abstractmethod
    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        """Lines of Python that use a loaded `model` and its `tokenizer`.

        Args:
            chats: prompts go through the chat template.
            sentence: `model` is a SentenceTransformer.
            options: arguments of the chat template.
            config: of the model, as its config.json has it; may be empty.
        """


class Task(ABC):
    """One task. Its objects hold nothing of a run: what depends on the data comes with the data."""

    name: str
    rows: Rows
    model: Model
    metrics: Metrics
    text: Text

    def check(self, recipe: Recipe) -> None:
        """Refuse settings that do not apply to this task, before torch. Raises UserError."""
        return


def check_one_stack(recipe: Recipe, but: str) -> None:
    """Refuse settings of `partial` by the depth of a block, for models of several stacks. Raises UserError.

    Args:
        but: which stacks a model of the task has, as a sentence.
    """
    for key, default in (("layer_decay", 1.0), ("gradual_unfreezing", None)):
        if getattr(recipe.strategy, key, default) != default:
            raise UserError(f"strategy.{key}: it counts the blocks of one stack, and {but}; remove it")


def ratios(columns: dict[str, np.ndarray], metrics: Mapping[str, Callable[[dict[str, float]], float]]) -> Score:
    """A score of sums over rows, from columns `[rows]` in float64."""
    import numpy as np

    names, table = list(columns), np.stack([np.asarray(c, dtype=np.float64) for c in columns.values()], axis=1)

    def score(weights: np.ndarray) -> dict[str, float]:
        sums = dict(zip(names, (weights @ table).tolist(), strict=True))
        return {name: metric(sums) for name, metric in metrics.items()}

    return score
