"""Telling which label, or labels, a text or a pair of texts has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.base import Metrics, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.config import Recipe
    from hfstrat.data import Prepared
    from hfstrat.data.classes import Classes
    from hfstrat.data_section import Data
    from hfstrat.distillation.distill_loss import Mix
    from hfstrat.evaluation.intervals import Score
    from hfstrat.model import Base

CONFUSIONS = 3  # that are printed
LONGEST = 24  # characters of a label there


class TextClassification(Task):
    """By encoders and decoders with transformers' own classification head; the head always learns, whole."""

    name = "text-classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    architecture = "ForSequenceClassification"
    unit = "text"
    metrics = ("loss", "accuracy", "macro_f1", "micro_f1", "rows")
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
        if getattr(recipe.strategy, "head", None) is False:
            raise UserError("strategy.head: false: a classifier's head is new and random, so that it has to learn; remove it")

    @property
    def columns(self) -> list[str]:
        from hfstrat.data.labels import OUR_COLUMNS

        return OUR_COLUMNS

    def told(self, head: list[dict[str, Any]], source: str, data: Data, wanted: str, columns: dict[str, str]) -> Any:
        from hfstrat.data.labels import LabelReading

        return LabelReading.of(head, source, wanted, columns)

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        if config.get("is_encoder_decoder"):
            raise UserError(
                f"model.name_or_path: {path} is a {config.get('model_type')}, an encoder with a decoder; for "
                "text-classification expected an encoder (BERT, RoBERTa, ModernBERT ...) or a decoder (Llama, Qwen, GPT ...)"
            )

    def shapes(self, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> tuple[dict[str, Any], bool] | None:
        from hfstrat.class_heads import with_head

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
        from hfstrat.data.classes import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.class_batches import ClassCollator

        has_types = (getattr(base.model.config, "type_vocab_size", 0) or 0) > 1
        several = len(data.label_names) if data.many else None
        return ClassCollator(pad_token_of(base.model.config, tokenizer), multiple, has_types, several)

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
        from hfstrat.class_heads import head_modules

        modules = head_modules(model)
        return modules, [name for name in missing if not name.startswith(tuple(f"{module}." for module in modules))]

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Decoders look for the last token that is not the padding one; none of ours needs a cache."""
        config = base.model.config
        config.pad_token_id = pad_token_of(config, tokenizer)
        config.use_cache = False

    def own_the_loss(self, base: Base) -> None:
        """`loss` takes the logits, which are few."""

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.losses import class_loss

        return class_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.losses import class_sums

        labels = inputs.pop("labels")
        return class_sums(model(**inputs)["logits"], labels)

    def measure(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...]) -> tuple[Metrics, dict[str, Any]]:
        from hfstrat.class_metrics import of_sums

        totals, marks = sums
        return of_sums(totals, marks, names)

    def score(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...], beside: dict[str, np.ndarray]) -> Score:
        from hfstrat.class_metrics import score_of

        return score_of(sums[0], sums[1], len(names))

    def held(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Classes:
        from hfstrat.data.classes import prepare_held

        names = [config.id2label[index] for index in sorted(config.id2label)]
        many = config.problem_type == "multi_label_classification"
        return prepare_held(data, tokenizer, names, many, samples, max_rows)

    def distiller(self, mix: Mix) -> Any:
        from hfstrat.distillation.class_distill import ClassDistiller

        return ClassDistiller(mix)

    def said(self, metrics: Metrics) -> str:
        micro = f", micro-F1 {metrics['micro_f1']:.1%}" if "micro_f1" in metrics else ""
        return f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.1%}{micro}"

    def compared(self, before: Metrics, after: Metrics) -> str:
        return (
            f"accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}, "
            f"macro-F1 {before['macro_f1']:.1%} -> {after['macro_f1']:.1%}"
        )

    def probe(self, data: Prepared, collate: Any) -> dict[str, Any]:
        """The longest and the shortest evaluation row together, so that padding is part of what is compared."""
        batch = collate([data.eval[0], data.eval[len(data.eval) - 1]])
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def answer(self, model: Any, data: Prepared, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        from hfstrat.evaluate import in_words, labels_of

        return in_words(labels_of(model, data.renderer, prompt, dtype))

    def prompt_text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return "\n\n".join([prompt["text"], prompt["text_pair"]] if "text_pair" in prompt else [prompt["text"]])

    def table(self, details: dict[str, Any]) -> list[str]:
        lines = []
        if largest := details.get("largest_label"):
            share = largest["accuracy_of_always_saying_it"]
            lines.append(f"to beat          accuracy {share:.1%} by always saying {short(largest['label'])}")
        worst = sorted((row for row in details.get("labels", []) if row["support"]), key=lambda row: row["f1"])[:CONFUSIONS]
        if worst:
            said = ", ".join(f"{short(row['label'])} {row['f1']:.1%} (of {row['support']:,})" for row in worst)
            lines.append(f"lowest F1        {said}")
        if pairs := details.get("confusions", [])[:CONFUSIONS]:
            said = ", ".join(f"{short(pair['true'])} as {short(pair['predicted'])} {pair['count']:,}x" for pair in pairs)
            lines.append(f"taken for        {said}")
        return lines

    def write_config(self, base: Base, folder: Path) -> None:
        """An adapter's base knows neither the labels nor the padding token: AutoConfig reads them from here."""
        base.model.config.save_pretrained(folder)

    def load_options(self, folder: str) -> dict[str, Any]:
        from transformers import AutoConfig

        return {"config": AutoConfig.from_pretrained(folder)}


def short(label: str) -> str:
    """A label as it stands in a line with others."""
    return label if len(label) <= LONGEST else label[: LONGEST - 3] + "..."


def pad_token_of(config: Any, tokenizer: Any) -> int:
    """The padding token's id. Raises UserError where there is none."""
    for pad in (tokenizer.pad_token_id, config.pad_token_id):
        if pad is not None:
            return int(pad)
    raise UserError("model.tokenizer: it has neither a padding nor an end token, so that texts cannot be put into one batch")
