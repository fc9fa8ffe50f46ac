"""Encoders and decoders with the classification head of transformers; the head is always trained completely."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.base import Model

if TYPE_CHECKING:
    from hfstrat.models.load import Base


class SequenceModel(Model):
    """AutoModelForSequenceClassification, whatever its outputs mean."""

    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    architecture = "ForSequenceClassification"
    config_keys: tuple[str, ...] = ("id2label", "label2id", "problem_type")
    if_missing = "it is damaged, or of another kind than its config says"

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        if config.get("is_encoder_decoder"):
            raise UserError(
                f"model.name_or_path: {path} is a {config.get('model_type')}, an encoder-decoder model; expected an encoder "
                "(BERT, RoBERTa, ModernBERT ...) or a decoder (Llama, Qwen, GPT ...)"
            )

    def check_config(self, name: str, config: Any) -> None:
        from transformers import AutoModelForSequenceClassification

        if type(config) not in AutoModelForSequenceClassification._model_mapping or config.is_encoder_decoder:
            raise UserError(
                f"model.name_or_path: {name} is a {config.model_type} model, for which transformers has no classification head "
                "that can be put on an encoder or a decoder; expected a model such as BERT, RoBERTa, ModernBERT, Llama, Qwen "
                "or GPT"
            )

    def shapes(self, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> tuple[dict[str, Any], bool] | None:
        from hfstrat.models.families import with_class_head

        found = with_class_head(shapes, config, labels)
        return None if found is None else (found, False)

    def split_missing(self, model: Any, missing: list[str]) -> tuple[list[str], list[str]]:
        from hfstrat.models.blocks import head_modules

        modules = head_modules(model)
        return modules, [name for name in missing if not name.startswith(tuple(f"{module}." for module in modules))]

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Set the padding token, by which decoders find the last token, and turn the cache off."""
        from hfstrat.models.load import pad_token_of

        config = base.model.config
        config.pad_token_id = pad_token_of(config, tokenizer)
        config.use_cache = False

    def write_config(self, base: Base, folder: Path) -> None:
        """Write config.json: the adapter's base knows neither the labels nor the padding token."""
        config = copy.deepcopy(base.model.config)
        vars(config).pop("quantization_config", None)  # of the base in training: its weights are not part of the adapter
        config.save_pretrained(folder)

    def load_options(self, folder: str) -> dict[str, Any]:
        from transformers import AutoConfig

        return {"config": AutoConfig.from_pretrained(folder)}


class Classifier(SequenceModel):
    """Outputs are logits of labels."""

    def config_options(self, data: Any, tokenizer: Any) -> dict[str, Any]:
        names = dict(enumerate(data.label_names))
        return {
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": "multi_label_classification" if data.many else "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
