"""Telling which label, or labels, a text or a pair of texts has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.base import Metrics, Quality, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.classification.prepare import Classes
    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.metrics import Score


class TextClassification(Task):
    """By encoders and decoders with transformers' own classification head; the head always learns, whole."""

    name = "text-classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    architecture = "ForSequenceClassification"
    pipeline = "text-classification"
    unit = "text"
    metrics = ("loss", "accuracy", "macro_f1", "micro_f1", "rows")
    framed = True
    quality = Quality("accuracy", True, "right", "rows")
    lacking = "it is damaged, or of another kind than its config says"
    shares = ("accuracy",)

    def check(self, recipe: Recipe) -> None:
        if recipe.data.overflow == "split":
            raise UserError(
                "data.overflow: split: the parts of a text have no label of their own; for text-classification expected "
                "truncate, drop or error"
            )
        for key in ("template", "train_on"):
            if getattr(recipe.data, key) != "auto":
                raise UserError(f"data.{key}: {getattr(recipe.data, key)} is for task: causal-lm; remove it")
        if recipe.model.gguf_file:
            raise UserError(
                "model.name_or_path: a .gguf file is read for task: causal-lm only; give a model folder or a Hub id"
            )
        for key in ("metrics", "choices", "lm_eval"):
            if getattr(recipe.evaluation, key):
                raise UserError(f"evaluation.{key}: it is for models that answer in words; remove it for text-classification")
        if recipe.evaluation.control not in ("auto", "off"):
            raise UserError("evaluation.control: it is a language model's loss; remove it for text-classification")
        if recipe.training.packing == "on":
            raise UserError("training.packing: on: texts of a classification are not packed; set auto or off")

    @property
    def columns(self) -> list[str]:
        from hfstrat.data.classification.labels import OUR_COLUMNS

        return OUR_COLUMNS

    @property
    def reader(self) -> Callable[..., Any]:
        from hfstrat.data.classification.labels import LabelFormat

        return LabelFormat.detect

    def told(self, head: list[dict[str, Any]], source: str, data: Data, wanted: str, columns: dict[str, str]) -> Any:
        return self.reader(head, source, wanted, columns)

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        if config.get("is_encoder_decoder"):
            raise UserError(
                f"model.name_or_path: {path} is a {config.get('model_type')}, an encoder with a decoder; for "
                "text-classification expected an encoder (BERT, RoBERTa, ModernBERT ...) or a decoder (Llama, Qwen, GPT ...)"
            )

    def shapes(self, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> tuple[dict[str, Any], bool] | None:
        from hfstrat.models.classifier_heads import with_head

        made = with_head(shapes, config, labels)
        return None if made is None else (made, False)

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> Classes:
        from hfstrat.data.classification.prepare import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import ClassCollator, has_token_types
        from hfstrat.models.classifier_heads import pad_token_of

        several = len(data.label_names) if data.many else None
        return ClassCollator(pad_token_of(base.model.config, tokenizer), multiple, has_token_types(base.model), several)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "token_type_ids": [], "label": [0] if data.many else 0}

    def config_options(self, data: Any, tokenizer: Any) -> dict[str, Any]:
        names = dict(enumerate(data.label_names))
        kind = "multi_label_classification" if data.many else "single_label_classification"
        return {
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": kind,
            "ignore_mismatched_sizes": True,
        }

    def check_config(self, name: str, config: Any) -> None:
        from transformers import AutoModelForSequenceClassification

        if type(config) not in AutoModelForSequenceClassification._model_mapping or config.is_encoder_decoder:
            raise UserError(
                f"model.name_or_path: {name} is a {config.model_type} model, for which transformers has no classification head "
                "that can be put on an encoder or a decoder; expected such as BERT, RoBERTa, ModernBERT, Llama, Qwen or GPT"
            )

    def new_weights(self, model: Any, missing: list[str]) -> tuple[list[str], list[str]]:
        from hfstrat.models.classifier_heads import head_modules

        modules = head_modules(model)
        return modules, [name for name in missing if not name.startswith(tuple(f"{module}." for module in modules))]

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Decoders look for the last token that is not the padding one; none of ours needs a cache."""
        from hfstrat.models.classifier_heads import pad_token_of

        config = base.model.config
        config.pad_token_id = pad_token_of(config, tokenizer)
        config.use_cache = False

    def own_the_loss(self, base: Base) -> None:
        """`loss` takes the logits, which are few."""

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.tasks.losses import class_loss

        return class_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.tasks.losses import class_sums

        labels = inputs.pop("labels")
        return class_sums(model(**inputs)["logits"], labels)

    def measure(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...]) -> tuple[Metrics, dict[str, Any]]:
        from hfstrat.tasks.classification_metrics import of_sums

        totals, marks = sums
        return of_sums(totals, marks, names)

    def score(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...], beside: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.classification_metrics import score_of

        return score_of(sums[0], sums[1], len(names))

    def held(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Classes:
        from hfstrat.data.classification.prepare import prepare_eval

        names = [config.id2label[index] for index in sorted(config.id2label)]
        many = config.problem_type == "multi_label_classification"
        return prepare_eval(data, tokenizer, names, many, samples, max_rows)

    def of_rows(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        from hfstrat.tasks.classification_metrics import columns_of

        return columns_of(*sums)

    def said(self, metrics: Metrics) -> str:
        micro = f", micro-F1 {metrics['micro_f1']:.1%}" if "micro_f1" in metrics else ""
        return f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.1%}{micro}"

    def compared(self, before: Metrics, after: Metrics) -> str:
        return (
            f"accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}, "
            f"macro-F1 {before['macro_f1']:.1%} -> {after['macro_f1']:.1%}"
        )

    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        """The longest and the shortest evaluation row together, so that padding is part of what is compared."""
        batch = collate([data.eval[0], data.eval[len(data.eval) - 1]])
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def answer(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        from hfstrat.tasks.generation import in_words, labels_of

        return in_words(labels_of(model, data.renderer, prompt, dtype))

    def prompt_text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return "\n\n".join([prompt["text"], prompt["text_pair"]] if "text_pair" in prompt else [prompt["text"]])

    def table(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.classification_metrics import lines_of

        return lines_of(details)

    def example(self, chats: bool, sentence: bool) -> list[str]:
        if sentence:
            return [
                'logits = model.encode(["a text to label"], convert_to_tensor=True)',
                "labels = model[0].auto_model.config.id2label",
                "print(labels[int(logits[0].argmax())])",
            ]
        return [
            'inputs = tokenizer("a text to label", return_tensors="pt")',
            "logits = model(**inputs).logits",
            "print(model.config.id2label[int(logits[0].argmax())])",
        ]

    def write_config(self, base: Base, folder: Path) -> None:
        """An adapter's base knows neither the labels nor the padding token: AutoConfig reads them from here."""
        import copy

        config = copy.deepcopy(base.model.config)
        vars(config).pop("quantization_config", None)  # of the base in training: the weights that it is for are not
        config.save_pretrained(folder)

    def load_options(self, folder: str) -> dict[str, Any]:
        from transformers import AutoConfig

        return {"config": AutoConfig.from_pretrained(folder)}
