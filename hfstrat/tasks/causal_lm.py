"""Predicting the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.base import Metrics, Quality, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.metrics import Score

NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class CausalLM(Task):
    """Texts, prompts with completions and conversations, by models with an LM head."""

    name = "causal-lm"
    peft_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    architecture = "ForCausalLM"
    pipeline = "text-generation"
    unit = "token"
    metrics = ("loss", "perplexity", "token_accuracy", "tokens", "teacher_kl")
    framed = False
    quality = Quality("loss", False, "nll", "items")
    lacking = "it is no causal LM or is damaged"
    generates = True

    @property
    def columns(self) -> list[str]:
        from hfstrat.data.formats import OUR_COLUMNS

        return OUR_COLUMNS

    @property
    def reader(self) -> Callable[..., Any]:
        from hfstrat.data.formats import RowFormat

        return RowFormat.detect

    def told(self, head: list[dict[str, Any]], source: str, data: Data, wanted: str, columns: dict[str, str]) -> Any:
        from hfstrat.data.formats import check_train_on

        reading = self.reader(head, source, wanted, columns)
        check_train_on(data, reading)
        return reading

    def check(self, recipe: Recipe) -> None:
        """All settings are for this task."""

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        architectures = [str(name) for name in config.get("architectures") or []]
        if config.get("is_encoder_decoder") or (architectures and architectures[0].endswith(NO_CAUSAL_LM)):
            raise UserError(
                f"model.name_or_path: {path} is a {architectures[0] if architectures else config.get('model_type')}, which is "
                "no causal LM; expected a decoder, whose architecture ends in ForCausalLM or LMHeadModel"
            )

    def shapes(self, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> tuple[dict[str, Any], bool] | None:
        return shapes, bool(config.get("tie_word_embeddings", False))

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> PreparedData:
        from hfstrat.data.prepare import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import Collator
        from hfstrat.models.load import takes_logits_mask

        selects = "forward" in vars(base.model)  # our loss is bound to it
        return Collator(tokenizer.pad_token_id or 0, multiple, takes_logits_mask(base.model), selects_rows=selects)

    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "labels": [1] * length}  # loss on all of it

    def check_config(self, name: str, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(
                f"model.name_or_path: {name} is a {config.model_type} model, which is no causal LM; "
                "expected a decoder such as a Llama, Qwen or GPT model"
            )

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """The model is as it is."""

    def own_the_loss(self, base: Base) -> None:
        from hfstrat.models import fused_loss

        if reason := fused_loss.bind_head_loss(base.model):
            base.say(f"the loss goes through the model's own logits, which takes more memory: {reason}")

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.tasks.losses import causal_lm_loss

        return causal_lm_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.tasks.losses import causal_lm_sums, sums_by_row

        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if "nll" not in outputs:
            return (causal_lm_sums(outputs["logits"], labels),)
        row = inputs["loss_rows"] // labels.shape[1]
        beside = [outputs["kl"]] if "kl" in outputs else []
        return (sums_by_row(outputs["nll"], outputs["correct"], row, labels.shape[0], *beside),)

    def measure(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...] = ()) -> tuple[Metrics, dict[str, Any]]:
        """Loss (nats a token), perplexity, token accuracy and, with a teacher, the divergence from it."""
        import numpy as np

        found = self.score(sums, names, {})(np.ones(len(sums[0])))
        return {**found, "tokens": float(sums[0][:, 1].astype("float64").sum())}, {}

    def score(self, sums: tuple[np.ndarray, ...], names: tuple[str, ...], beside: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.metrics import ratios

        columns = self.of_rows(sums) | beside
        metrics = {
            "loss": lambda s: s["nll"] / max(s["items"], 1),
            "perplexity": lambda s: math.exp(min(s["nll"] / max(s["items"], 1), 700)),
            "token_accuracy": lambda s: s["right"] / max(s["items"], 1),
            "teacher_kl": lambda s: s["kl"] / max(s["items"], 1),
            "bits_per_byte": lambda s: s["nll"] / math.log(2) / max(s["bytes"], 1),
        }
        needed = {"teacher_kl": "kl", "bits_per_byte": "bytes"}
        return ratios(columns, {name: each for name, each in metrics.items() if needed.get(name, "nll") in columns})

    def held(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.data.prepare import prepare_eval

        return prepare_eval(data, tokenizer, samples, max_rows)

    def of_rows(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """`kl` (nats, summed) is that from a teacher, where there is one."""
        return dict(zip(("nll", "items", "right", "kl"), sums[0].astype("float64").T, strict=False))

    def said(self, metrics: Metrics) -> str:
        loss, right = metrics["loss"], metrics["token_accuracy"]
        return f"loss {loss:.4f}, perplexity {metrics['perplexity']:.2f}, token accuracy {right:.1%}"

    def compared(self, before: Metrics, after: Metrics) -> str:
        return (
            f"perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f}, "
            f"token accuracy {before['token_accuracy']:.1%} -> {after['token_accuracy']:.1%}"
        )

    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        return {"input_ids": data.probe(), "use_cache": False}

    def answer(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        from hfstrat.tasks.generation import answer

        return answer(model, data.renderer, prompt, max_new_tokens, dtype)

    def prompt_text(self, prompt: Any) -> str:
        from hfstrat.tasks.generation import prompt_text

        return prompt_text(prompt)

    def example(self, chats: bool, sentence: bool) -> list[str]:
        asks = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
        if chats:
            asks = (
                'inputs = tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Who are you?"}],\n'
                '    add_generation_prompt=True, return_tensors="pt", return_dict=True,\n)'
            )
        return [
            asks,
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]

    def write_config(self, base: Base, folder: Path) -> None:
        """An adapter's base knows everything."""
