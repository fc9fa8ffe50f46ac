"""What the tasks share that predict classes of a file: an image or a recording."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.errors import UserError
from hfstrat.tasks.base import Quality, Rows, Score, Task, Values
from hfstrat.tasks.heads import names_of
from hfstrat.tasks.text_classification import Classifier, ClassMetrics, LabelText, chosen_labels

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.media_files import Kind, MediaRef
    from hfstrat.models.load import Base
    from hfstrat.models.pooling import Pooling
    from hfstrat.recipe.data import Data, Source
    from hfstrat.recipe.schema import Model as ModelSection
    from hfstrat.recipe.schema import Recipe

PROCESSOR = "preprocessor_config.json"


class MediaRows(Rows):
    """Files with one class, or any number of them."""

    framed = False
    kind: Kind
    opens: Any  # the `MediaSource` of the kind
    processor_name: str  # what transformers calls it

    def check_processor(self, model: ModelSection, network: bool) -> None:
        from hfstrat.models import check

        source, key = (model.tokenizer, "model.tokenizer") if model.tokenizer else (model.name_or_path, "model.name_or_path")
        expected = f"a folder or a Hub id with {self.processor_name}"
        folder = check.local_folder(key, source, None, PROCESSOR, expected, network and bool(model.tokenizer))
        if folder is not None and not self.has_processor(folder):
            raise UserError(
                f"{key}: {source} has no {self.processor_name.split(' ', 1)[1]} ({PROCESSOR}); set model.tokenizer to the "
                "folder or Hub id of one"
            )

    @property
    @abstractmethod
    def preparing(self) -> Any:
        """The module of `hfstrat.data` that prepares the rows; it imports datasets."""

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> Any:
        return self.preparing.prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Any:
        many = config.problem_type == "multi_label_classification"
        return self.preparing.prepare_eval(data, tokenizer, names_of(config), many, samples, max_rows)

    def has_processor(self, folder: Path) -> bool:
        return (folder / PROCESSOR).is_file()

    def same_inputs(self, one: Any, other: Any) -> bool:
        return bool(one.processor.to_dict() == other.processor.to_dict())

    def check_source(self, source: Source, data: Data, key: str) -> bool:
        from hfstrat.data import media_rows

        media_rows.check_source(source, data, key, self.reader, self.opens)
        return True

    def digest(self, source: Source, data: Data, key: str) -> str:
        return str(self.opens.open(source, data, key).digest())

    def files(self, targets: Iterable[str]) -> list[MediaRef]:
        from hfstrat.data.media_rows import refs_of

        return refs_of(targets, self.kind)

    def as_text(self, row: dict[str, Any], tokenizer: Any, most: int | None = None) -> str:
        return self.kind.ref(row["path"], row["member"]).name


class MediaModel(Classifier):
    """A class of transformers for files with a processor."""

    peft_type = None  # PEFT has no type for it: its general class passes any inputs on
    reads_tokens = False
    expected: str  # models of the task, in words
    what: str  # that transformers lacks for others

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None] | None:
        from hfstrat.models import unused_parameters

        return unused_parameters.use_all(base.model)  # such as the embeddings of masks of DINOv2 and wav2vec 2.0

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        from hfstrat.models.transformers_source import families_of

        known, family = families_of(self.auto_class), str(config.get("model_type", ""))
        if known and family not in known:
            raise UserError(self.refusal(path, family))

    def check_config(self, name: str, config: Any) -> None:
        import transformers

        if type(config) not in getattr(transformers, self.auto_class)._model_mapping:
            raise UserError(self.refusal(name, config.model_type))

    def refusal(self, name: str, family: str) -> str:
        return (
            f"model.name_or_path: {name} is a {family} model, for which transformers has no {self.what}; expected a model such "
            f"as {self.expected}"
        )

    def pooling(self, model: ModelSection, config: dict[str, Any]) -> tuple[Pooling | None, dict[str, Any]]:
        return None, {}

    def shapes(
        self, shapes: dict[str, Any], config: dict[str, Any], labels: int, pooled: bool = False
    ) -> tuple[dict[str, Any], bool] | None:
        return None  # transformers decides when the model is loaded

    def write_config(self, base: Base, folder: Path) -> None:
        base.model.config.architectures = [type(base.model).__name__]  # of a checkpoint without a head it is the body's class
        super().write_config(base, folder)


@dataclass(frozen=True)
class MediaMetrics(ClassMetrics):
    """Loss (nats per file or, with several classes, per class), accuracy, F1, and what rankings by probability give."""

    names: ClassVar[tuple[str, ...]] = (
        *("loss", "accuracy", "balanced_accuracy", "macro_f1", "micro_f1"),
        *("auroc", "average_precision", "recall_at_90_precision", "rows"),
    )

    @property
    def quality(self) -> Quality:
        return Quality("accuracy", True, "right", "rows")

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """As of `ClassMetrics`, and the probabilities `[B, classes]` in float32."""
        kept: list[Any] = []

        def outputs(**given: Any) -> Any:
            kept.append(model(**fitted(model, given)))
            return kept[0]

        config, labels = getattr(model, "config", None), inputs["labels"]
        outputs.config = config  # type: ignore[attr-defined]
        found = super().sums(outputs, inputs)
        logits = kept[0]["logits"].float()
        return *found, logits.sigmoid() if labels.is_floating_point() else logits.softmax(-1)

    def ranked(self, marks: np.ndarray, chances: np.ndarray) -> Score:
        """Metrics by probability, as a function of how often each row counts."""
        from hfstrat.tasks.rankings import score_of

        return score_of(marks, chances, len(self.labels))

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        from hfstrat.tasks.rankings import by_class

        totals, marks, chances = sums
        values, details = super().measure((totals, marks))
        values |= self.ranked(marks, chances)(np.ones(len(marks)))
        for row, more in zip(details["labels"], by_class(marks, chances, len(self.labels)), strict=False):
            row |= more
        return values, details

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        totals, marks, chances = sums
        plain, ranked = super().score((totals, marks), extra), self.ranked(marks, chances)
        return lambda weights: plain(weights) | ranked(weights)

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        return super().columns(sums[:2])


def fitted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs in the precision of a model's weights, where autocast does not choose it: a result may have 16 bits."""
    import torch

    weight = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    if weight is None or torch.is_autocast_enabled(weight.device.type):
        return inputs
    return {name: t.to(weight.dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def outputs_of(model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The outputs of a model in evaluation mode, by autocast unless `dtype` is float32; the model's mode is kept."""
    import torch

    weights, was_training = next(model.parameters()), model.training
    wanted = weights.dtype if dtype == torch.float32 else torch.float32
    moved = {name: t.to(weights.device, wanted if t.is_floating_point() else None) for name, t in inputs.items()}
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(weights.device.type, dtype, enabled=dtype != torch.float32):
            return model(**moved)
    finally:
        model.train(was_training)


def ref_of(prompt: Any, kind: Kind) -> MediaRef:
    """A file as it is found, from itself or its path."""
    return kind.ref(str(Path(prompt).expanduser())) if isinstance(prompt, str) else prompt


class MediaText(LabelText):
    """Predictions are class names with probabilities."""

    kind: Kind

    @abstractmethod
    def inputs(self, processor: Any, ref: MediaRef) -> dict[str, torch.Tensor]:
        """The inputs of a model for one file, `[1, ...]`. Raises Unreadable."""

    def outputs(self, model: Any, texts: Any, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        """The classes of a file.

        Args:
            texts: the processor.
            prompt: a `MediaRef`, or the path of a file.
        """

        from hfstrat.data.media_files import Unreadable

        ref = self.ref_of(prompt)
        try:
            given = self.inputs(texts, ref)
        except Unreadable as error:
            raise UserError(f"{ref.name}: {error}") from None
        return chosen_labels(model.config, outputs_of(model, given, dtype).logits[0].float())

    def ref_of(self, prompt: Any) -> MediaRef:
        return ref_of(prompt, self.kind)

    def prompt(self, prompt: Any) -> str:
        return self.ref_of(prompt).name

    def metrics(self, metrics: Values) -> str:
        more = f", balanced accuracy {metrics['balanced_accuracy']:.1%}" if "balanced_accuracy" in metrics else ""
        return super().metrics(metrics) + more

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.rankings import lines_of

        return [*super().details(details), *lines_of(details)]


TEXT_ONLY = ("max_length", "overflow", "template", "train_on", "chat_template_kwargs", "documents")


class MediaTask(Task):
    """A task whose examples are files."""

    rows: MediaRows

    def check(self, recipe: Recipe) -> None:
        for key in TEXT_ONLY:
            if getattr(recipe.data, key) != type(recipe.data).model_fields[key].default:
                raise UserError(f"data.{key}: it is for texts; remove it for task: {self.name}")
        model = recipe.model
        for key in ("add_tokens", "pooling", "quantization"):
            if getattr(model, key):
                raise UserError(f"model.{key}: it is for models of text; remove it for task: {self.name}")
        if model.gguf_file:
            raise UserError(
                "model.name_or_path: a .gguf file is read for task: causal-lm only; give a model folder or a Hub id"
            )
        for key in ("metrics", "choices", "lm_eval"):
            if getattr(recipe.evaluation, key):
                raise UserError(f"evaluation.{key}: it is for models that generate text; remove it for {self.name}")
        if recipe.evaluation.control not in ("auto", "off"):
            raise UserError(f"evaluation.control: it is a language model's loss; remove it for {self.name}")
        if recipe.training.must_pack:
            given = str(recipe.training.packing).lower()
            raise UserError(f"training.packing: {given}: examples of {self.name} are not packed; set auto or false")


def check_augmentation(key: str, recipe: Recipe, noun: str) -> None:
    """Refuse an augmentation where everything is computed once, and the settings of one that is off.

    Args:
        key: the section of the recipe.

    Raises:
        UserError: there is such a setting.
    """
    wanted, strategy = getattr(recipe, key), recipe.strategy
    once = f"strategy {strategy.name} computes the features of each {noun} once, so that they cannot vary"
    if wanted.augmentation == "on" and not strategy.takes_augmented:
        raise UserError(f"{key}.augmentation: {once}; set off or auto")
    if getattr(wanted, "views", 1) > 1:
        return  # of the changes
    usual = type(wanted.changes)()
    changed = next((name for name, value in wanted.changes._asdict().items() if value != getattr(usual, name)), None)
    if wanted.augmentation == "auto" and changed is not None and not strategy.augments:
        cure = f"set {key}.augmentation: on, or remove it" if strategy.takes_augmented else f"remove it ({once})"
        raise UserError(f"{key}.{changed}: augmentation is off for strategy {strategy.name}; {cure}")
