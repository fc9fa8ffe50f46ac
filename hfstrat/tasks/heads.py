"""What the tasks with a head share: one text or a pair between special tokens, and outputs for the complete example."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data.label_names import sources_of
from hfstrat.errors import UserError
from hfstrat.tasks.base import Model, Rows, Text

if TYPE_CHECKING:
    import torch

    from hfstrat.data.labeled import Texts
    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.models.pooling import Pooling
    from hfstrat.recipe.schema import Model as ModelSection
    from hfstrat.recipe.schema import Recipe


NAMES_SHOWN = 4


class HeadRows(Rows):
    """Examples of one text or two between special tokens, with `labels` of the complete example."""

    framed = True

    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        """The longest and the shortest evaluation example together, so that padding is part of what is compared."""
        batch = collate([data.eval[0], data.eval[len(data.eval) - 1]])
        return {name: tensor for name, tensor in batch.items() if name != "labels"}


class HeadModel(Model):
    """AutoModelForSequenceClassification, whatever its outputs mean."""

    peft_type: str | None = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    architecture: str | tuple[str, ...] = "ForSequenceClassification"
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

    def fits(self, config: dict[str, Any]) -> bool:
        return not has_numbers(config) and not is_of_sound(config)

    def pooling(self, model: ModelSection, config: dict[str, Any]) -> tuple[Pooling | None, dict[str, Any]]:
        from hfstrat.models import pooling

        return pooling.of_model(model, config)

    def stored_outputs(self, config: Any, pooling: Pooling | None = None) -> dict[str, Any]:
        """The checkpoint's own names, if it has a head: the weights fit them, and are arranged for the data afterwards."""
        has_head = str((config.architectures or [""])[0]).endswith(self.architecture)
        has_head = has_head if pooling is None else pooling.head is not None
        return {"id2label": dict(config.id2label), "label2id": dict(config.label2id)} if has_head else {}

    def fit_outputs(self, base: Base, config: Any, data: PreparedData | None) -> None:
        from hfstrat.models.class_outputs import arrange, set_names

        model, names = base.model, list(data.label_names if data is not None else names_of(config))
        if base.new_head:
            if self.stored_outputs(config, base.pooling):  # it was made for the names of a config whose weights do not fit
                arrange(model, [None] * len(names), names)
            return
        sources, lines = self.sources(config, names, "the checkpoint")
        kind, before = model.config.problem_type, config.problem_type
        base.new_head = None in sources
        if before not in (None, kind) and not base.new_head:
            lines = [*lines, f"the head of the checkpoint was trained as {before}, and continues as {kind}"]
        for line in lines:
            base.say(line)
        if sources == list(range(model.config.num_labels)):
            set_names(model, names)
        else:
            arrange(model, sources, names)

    def fit_adapter(self, base: Base, source: str) -> Callable[[Any], None]:
        """The head of the base gets the outputs of the adapter's head, which PEFT then loads, and at last those of the data."""
        from hfstrat.models.class_outputs import arrange, set_names

        names, config = names_of(base.model.config), adapter_config(base, source)
        if config is None:
            return lambda model: None
        theirs = names_of(config)
        if len(theirs) != len(names):
            arrange(base.model, [None] * len(theirs), theirs)

        def fit(model: Any) -> None:
            sources, lines = self.sources(config, names, "the adapter")
            for line in lines:
                base.say(line)
            base.new_head = None in sources
            if sources == list(range(len(theirs))):
                set_names(base.model, names)
            else:
                arrange(base.model, sources, names)

        return fit

    @abstractmethod
    def sources(self, config: Any, names: list[str], whose: str) -> tuple[list[int | None], list[str]]:
        """For each output the one of a trained head that it continues, None for a new one; and lines that say so.

        Args:
            config: with the names and the kind of the head's outputs.
            names: of the data.
            whose: head it is.
        """

    @abstractmethod
    def problem_type(self, data: Any) -> str:
        """What transformers calls the kind of the outputs."""

    def config_options(self, data: Any, tokenizer: Any) -> dict[str, Any]:
        names = dict(enumerate(data.label_names))
        return {
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": self.problem_type(data),
            "ignore_mismatched_sizes": True,
        }

    def shapes(
        self, shapes: dict[str, Any], config: dict[str, Any], labels: int, pooled: bool = False
    ) -> tuple[dict[str, Any], bool] | None:
        from hfstrat.models.families import with_class_head

        found = with_class_head(shapes, config, labels, pooled)
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


def names_of(config: Any) -> list[str]:
    """The names of a classification model's outputs, in their order."""
    return [config.id2label[index] for index in sorted(config.id2label)]


def adapter_config(base: Base, source: str) -> Any:
    """The config that names the outputs of an adapter's head; None, and a remark, where the adapter has none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        names = shortened(names_of(base.model.config))
        base.say(f"the adapter does not record the names of its outputs (config.json); expected are {names}, in this order")
        return None


def shortened(names: Sequence[str]) -> str:
    """The first names of a list, as text."""
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def continued(known: list[str], names: list[str], whose: str) -> tuple[list[int | None], list[str]]:
    """The outputs of a trained head by name, and lines about those that are moved, new, or left out."""
    sources, lines = sources_of(names, known), list[str]()
    found = [source for source in sources if source is not None]
    if not found:
        return sources, [
            f"the head of {whose} predicts {shortened(known)}, the data have {shortened(names)}: it is re-initialized"
        ]
    if new := [name for name, source in zip(names, sources, strict=True) if source is None]:
        lines.append(f"the head of {whose} has no output for {shortened(new)}: these start with random weights")
    if gone := [name for index, name in enumerate(known) if index not in set(found)]:
        lines.append(f"the data lack {shortened(gone)}: these outputs of the head of {whose} are removed")
    if not lines and found != sorted(found):
        lines.append(f"the outputs of the head of {whose} are reordered as in the data: {shortened(names)}")
    return sources, lines


def has_numbers(config: dict[str, Any]) -> bool:
    """Whether outputs are numbers; transformers takes a single output without a problem type for one, too."""
    single = config.get("problem_type") is None and len(config.get("id2label") or "several") == 1
    return single or config.get("problem_type") == "regression"


def is_of_sound(config: dict[str, Any]) -> bool:
    """Whether a classifier is one of recordings, which transformers calls a sequence classification in some families."""
    from hfstrat.models.transformers_source import families_of

    return config.get("model_type") in families_of("AutoModelForAudioClassification")


class HeadText(Text):
    """Predictions are named numbers for one text or pair."""

    pipeline = "text-classification"
    unit = "text"
    finds_boxes: bool = False  # whether predictions are boxes in an image, which `draw` draws

    def predict(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        return self.line(self.outputs(model, data.renderer, prompt, dtype))

    @abstractmethod
    def outputs(self, model: Any, texts: Texts, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        """The predictions for one text or pair: names with numbers."""

    def draw(self, image: Any, outputs: Any, file: Path) -> None:
        """Draw the predictions of `outputs` into an image file."""
        raise NotImplementedError

    @abstractmethod
    def line(self, outputs: list[tuple[str, float]]) -> str:
        """The predictions of `outputs` in a line."""

    @abstractmethod
    def record(self, outputs: list[tuple[str, float]]) -> dict[str, Any]:
        """The predictions of `outputs` as keys of a JSON object."""

    def prompt(self, prompt: Any) -> str:
        """A text, or both texts of a pair with a blank line between them."""
        if isinstance(prompt, str):
            return prompt
        return "\n\n".join(prompt[name] for name in ("text", "text_pair") if name in prompt)


def logits_of(model: Any, texts: Texts, prompt: Any, compute_dtype: torch.dtype) -> torch.Tensor:
    """The model's outputs for one text or pair, `[outputs]` in float32.

    Args:
        prompt: a text, or `{"text": ..., "text_pair": ...}`.
        compute_dtype: of the forward pass: autocast unless it is float32.
    """
    import torch

    from hfstrat.data.collate import has_token_types
    from hfstrat.data.labeled import LabeledText

    row = prompt if isinstance(prompt, dict) else {"text": prompt}
    encoded = texts.encode([LabeledText(row["text"], row.get("text_pair"), [])])[0]
    device, was_training = next(model.parameters()).device, model.training
    inputs = {"input_ids": torch.tensor([encoded.input_ids], device=device)}
    if encoded.token_type_ids and has_token_types(model):
        inputs["token_type_ids"] = torch.tensor([encoded.token_type_ids], device=device)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            found: torch.Tensor = model(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs).logits[0].float()
    finally:
        model.train(was_training)
    return found


def check_texts(recipe: Recipe) -> None:
    """Refuse settings that are for generated text, in a task that predicts something about complete texts."""
    task = recipe.task
    if recipe.data.overflow == "split":
        raise UserError(
            f"data.overflow: split: a label or number belongs to a complete text, not to its parts; for {task} "
            "expected truncate, drop or error"
        )
    for key in ("template", "train_on", "chat_template_kwargs"):
        if getattr(recipe.data, key) not in ("auto", {}):
            raise UserError(f"data.{key}: {getattr(recipe.data, key)} is for task: causal-lm; remove it")
    if recipe.model.gguf_file:
        raise UserError("model.name_or_path: a .gguf file is read for task: causal-lm only; give a model folder or a Hub id")
    for key in ("metrics", "choices", "lm_eval"):
        if getattr(recipe.evaluation, key):
            raise UserError(f"evaluation.{key}: it is for models that generate text; remove it for {task}")
    if recipe.evaluation.control not in ("auto", "off"):
        raise UserError(f"evaluation.control: it is a language model's loss; remove it for {task}")
    if recipe.training.must_pack:
        given = str(recipe.training.packing).lower()
        raise UserError(f"training.packing: {given}: examples of {task} are not packed; set auto or false")
