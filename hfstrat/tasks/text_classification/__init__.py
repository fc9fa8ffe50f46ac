"""Predicting which label, or labels, a text or a pair of texts has, by encoders and decoders with a classification head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hfstrat.data.labeled import OUR_COLUMNS, LabelFormat
from hfstrat.data.labels import as_number
from hfstrat.data.values import is_missing
from hfstrat.tasks.base import Metrics, Pictures, Quality, Score, Task, Values, Wrong
from hfstrat.tasks.heads import (
    HeadModel,
    HeadRows,
    HeadText,
    check_texts,
    continued,
    has_numbers,
    logits_of,
    names_of,
    shortened,
)
from hfstrat.tasks.text_classification.thresholds import DEFAULT, KEY, at_precision, choose, of_config, rare_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.classes import Classes
    from hfstrat.data.labeled import Texts
    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.report import Result


class LabeledRows(HeadRows):
    """Examples with one label, or any number of them."""

    columns = OUR_COLUMNS

    @property
    def reader(self) -> Callable[..., Any]:
        return LabelFormat.detect

    def fits(self, reading: Any, head: list[dict[str, Any]]) -> bool:
        """Numbers with fractions are no classes."""
        label = next(theirs for theirs, ours in reading.names.items() if ours == reading.columns[2])
        values = [row[label] for row in head if not is_missing(row.get(label))]
        numbers = [None if isinstance(v, bool | list | tuple) else as_number(str(v)) for v in _flat(values)]
        return any(n is None for n in numbers) or all(n is not None and n.is_integer() for n in numbers)

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> Classes:
        from hfstrat.data.classes import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Classes:
        from hfstrat.data.classes import prepare_eval

        names = names_of(config)
        many = config.problem_type == "multi_label_classification"
        return prepare_eval(data, tokenizer, names, many, samples, max_rows)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import ClassCollator, has_token_types
        from hfstrat.models.load import pad_token_of

        several = len(data.label_names) if data.many else None
        return ClassCollator(pad_token_of(base.model.config, tokenizer), multiple, has_token_types(base.model), several)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "token_type_ids": [], "label": [0] if data.many else 0}


def _flat(values: list[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]


class Classifier(HeadModel):
    """Outputs are logits of labels."""

    config_keys = (*HeadModel.config_keys, KEY)
    head_share = 10.0  # measured: benchmarks/results/defaults.md

    def sources(self, config: Any, names: list[str], whose: str) -> tuple[list[int | None], list[str]]:
        known = names_of(config)
        if has_numbers(config.to_dict()):
            return [None] * len(names), [f"the head of {whose} predicts numbers ({shortened(known)}): it is re-initialized"]
        return continued(known, names, whose)

    def adapt(self, base: Base, tokenizer: Any) -> None:
        super().adapt(base, tokenizer)
        vars(base.model.config).pop(KEY, None)  # of an earlier training

    def problem_type(self, data: Any) -> str:
        return "multi_label_classification" if data.many else "single_label_classification"


@dataclass(frozen=True)
class ClassMetrics(Metrics):
    """Loss (nats per text or, with several labels, per label), accuracy and F1."""

    weights: tuple[float, ...] = ()  # of the classes in the training loss; empty: equal
    gamma: float = 0.0  # of the focal loss in training; 0: cross-entropy
    mixes: bool = False  # whether training labels are shares of the classes

    names: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "rows")
    shares: ClassVar[tuple[str, ...]] = ("accuracy",)

    @property
    def quality(self) -> Quality:
        return Quality("accuracy", True, "right", "rows")

    def for_training(self, recipe: Recipe, data: PreparedData) -> Self:
        from hfstrat.tasks.text_classification.class_weights import weights_of

        weights, gamma = weights_of(recipe.training.class_weights, data)
        return replace(self, weights=weights, gamma=gamma)

    def row_weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        import torch

        return torch.tensor(self.weights)[labels] if self.weights else None

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.tasks.text_classification.scores import class_loss

        return class_loss(outputs, labels, num_items_in_batch, self.weights, self.gamma, self.mixes)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.tasks.text_classification.scores import class_sums

        labels, config = inputs.pop("labels"), getattr(model, "config", None)
        rare = None if labels.is_floating_point() else rare_of(config, self.labels)
        return class_sums(model(**inputs)["logits"], labels, of_config(config, self.labels), rare)

    def thresholds(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        import numpy as np

        chances = 1 / (1 + np.exp(-outputs.astype(np.float64)))
        return {KEY: dict(zip(self.labels, choose(chances, labels > 0.5).round(4).tolist(), strict=True))}

    def rare_threshold(self, outputs: np.ndarray, labels: np.ndarray, rare: int, precision: float) -> float | None:
        """The threshold of a class with this precision on examples, from the logits `[n, L]` and their classes `[n]`."""
        import numpy as np

        chances = np.exp(outputs.astype(np.float64) - outputs.max(1, keepdims=True))
        return at_precision(chances[:, rare] / chances.sum(1), labels == rare, precision)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        from hfstrat.tasks.text_classification.scores import of_sums

        totals, marks = sums
        return of_sums(totals, marks, self.labels)

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.text_classification.scores import score_of

        return score_of(sums[0], sums[1], len(self.labels))

    def mistakes(self, sums: tuple[np.ndarray, ...], most: int) -> list[Wrong]:
        from hfstrat.tasks.text_classification.scores import worst_of

        return worst_of(sums[0], sums[1], self.labels, most)

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        from hfstrat.tasks.text_classification.scores import columns_of

        return columns_of(*sums)


class LabelText(HeadText):
    """Predictions are labels with their probabilities."""

    def outputs(self, model: Any, texts: Texts, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        return labels_of(model, texts, prompt, dtype)

    def line(self, outputs: list[tuple[str, float]]) -> str:
        return ", ".join(f"{label} ({chance:.0%})" for label, chance in outputs) or "(none)"

    def record(self, outputs: list[tuple[str, float]]) -> dict[str, Any]:
        return {"labels": [label for label, _ in outputs], "scores": [chance for _, chance in outputs]}

    def metrics(self, metrics: Values) -> str:
        micro = f", micro-F1 {metrics['micro_f1']:.1%}" if "micro_f1" in metrics else ""
        return f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.1%}{micro}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}, "
            f"macro-F1 {before['macro_f1']:.1%} -> {after['macro_f1']:.1%}"
        )

    def target(self, value: Any, names: tuple[str, ...]) -> str:
        labels = value if isinstance(value, list) else [value]
        return f"label {', '.join(names[label] for label in labels) or '(none)'}"

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.text_classification.scores import lines_of

        return lines_of(details)

    def sections(self, result: Result, pictures: Pictures) -> list[Section]:
        from hfstrat.tasks.text_classification import page

        return page.sections(result, pictures, self.unit)

    def advice(self, result: Result) -> list[tuple[str, str]]:
        from hfstrat.tasks.text_classification import page

        return page.advice(result)

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        lines = [
            'inputs = tokenizer("a text to label", return_tensors="pt")',
            "logits = model(**inputs).logits",
            "config = model.config",
        ]
        if sentence:
            lines = [
                'logits = model.encode(["a text to label"], convert_to_tensor=True)',
                "config = model[0].auto_model.config",
            ]
        if config.get("problem_type") != "multi_label_classification" and config.get(KEY):
            return [
                *lines,
                f"name, threshold = next(iter(config.{KEY}.items()))  # a pipeline does not know it",
                "chances = {label: float(logits[0].softmax(-1)[index]) for index, label in config.id2label.items()}",
                "others = {label: chance for label, chance in chances.items() if label != name}",
                "print(name if chances[name] > threshold else max(others, key=others.get))",
            ]
        if config.get("problem_type") != "multi_label_classification":
            return [*lines, "print(config.id2label[int(logits[0].argmax())])"]
        above = f"config.{KEY}[label]" if KEY in config else "0.5"
        return [
            *lines,
            "chances = logits[0].sigmoid().tolist()",
            f"print([label for index, label in config.id2label.items() if chances[index] > {above}])",
        ]


def labels_of(model: Any, texts: Texts, prompt: Any, compute_dtype: torch.dtype) -> list[tuple[str, float]]:
    """The labels that a classifier predicts for one text or pair, with probabilities; see `logits_of`.

    Returns:
        The most probable label; of a model for several labels those above their thresholds (one half), which may be none.
    """
    return chosen_labels(model.config, logits_of(model, texts, prompt, compute_dtype))


def chosen_labels(config: Any, logits: torch.Tensor) -> list[tuple[str, float]]:
    """As `labels_of`, from the logits of one example, `[L]`."""
    if config.problem_type == "multi_label_classification":
        chances, above = logits.sigmoid(), of_config(config, names_of(config))
        order = chances.argsort(descending=True).tolist()
        chosen = [index for index in order if chances[index] > (DEFAULT if above is None else above[index])]
    else:
        from hfstrat.tasks.text_classification.scores import predicted_classes

        chances = logits.softmax(-1)
        chosen = [int(predicted_classes(logits[None], rare_of(config, names_of(config)))[0])]
    return [(config.id2label[index], float(chances[index])) for index in chosen]


class TextClassification(Task):
    """The task `text-classification`."""

    name = "text-classification"
    rows = LabeledRows()
    model = Classifier()
    metrics = ClassMetrics()
    text = LabelText()

    def check(self, recipe: Recipe) -> None:
        check_texts(recipe)
