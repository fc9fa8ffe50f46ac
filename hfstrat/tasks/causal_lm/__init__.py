"""Predicting the next token: plain texts, prompts with completions, and conversations, by models with an LM head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfstrat.data.formats import OUR_COLUMNS, RowFormat, check_train_on
from hfstrat.errors import UserError
from hfstrat.tasks.base import Metrics, Model, Quality, Rows, Score, Task, Text, Values, ratios

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe

OTHER_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class LanguageRows(Rows):
    """Examples whose labels are their own next tokens."""

    columns = OUR_COLUMNS
    framed = False
    streams = True

    @property
    def reader(self) -> Callable[..., Any]:
        return RowFormat.detect

    def read_format(
        self,
        head: list[dict[str, Any]],
        source: str,
        data: Data,
        wanted: str = "auto",
        columns: dict[str, str] | None = None,
        class_names: dict[str, list[str]] | None = None,
    ) -> Any:
        reading = super().read_format(head, source, data, wanted, columns, class_names)
        check_train_on(data, reading)
        return reading

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
        from hfstrat.data.streaming import prepare_streamed

        if data.streaming:
            return prepare_streamed(data, tokenizer, seed, samples, max_eval_rows)
        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.data.prepare import prepare_eval

        return prepare_eval(data, tokenizer, samples, max_rows)

    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import Collator
        from hfstrat.models.fused_loss import is_bound
        from hfstrat.models.load import takes_logits_mask

        selects = is_bound(base.model)
        return Collator(tokenizer.pad_token_id or 0, multiple, takes_logits_mask(base.model), selects_rows=selects)

    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "labels": [1] * length}  # loss on all of it

    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        return {"input_ids": data.probe(), "use_cache": False}


class LanguageModel(Model):
    """AutoModelForCausalLM, with our loss bound to its forward."""

    peft_type: str | None = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    architecture = "ForCausalLM"
    if_missing = "it is no causal LM or is damaged"

    def check_architecture(self, path: str, config: dict[str, Any]) -> None:
        architectures = [str(name) for name in config.get("architectures") or []]
        if config.get("is_encoder_decoder") or (architectures and architectures[0].endswith(OTHER_HEADS)):
            raise UserError(
                f"model.name_or_path: {path} is a {architectures[0] if architectures else config.get('model_type')}, which is "
                "no causal LM; expected a decoder, whose architecture ends in ForCausalLM or LMHeadModel"
            )

    def check_config(self, name: str, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(
                f"model.name_or_path: {name} is a {config.model_type} model, which is no causal LM; "
                "expected a decoder such as a Llama, Qwen or GPT model"
            )

    def shapes(
        self, shapes: dict[str, Any], config: dict[str, Any], labels: int, pooled: bool = False
    ) -> tuple[dict[str, Any], bool] | None:
        return shapes, bool(config.get("tie_word_embeddings", False))

    def adapt(self, base: Base, tokenizer: Any) -> None:
        """Let generation end with the tokens that end an answer of the chat template."""
        from hfstrat.data.chat_template import end_tokens

        config = getattr(base.model, "generation_config", None)
        given = [] if config is None or config.eos_token_id is None else config.eos_token_id
        known = [*given] if isinstance(given, list) else [given]
        missing = [end for end in end_tokens(tokenizer) if end not in (known or [tokenizer.eos_token_id])]
        if config is not None and missing:
            first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            config.eos_token_id = list(dict.fromkeys([*(known or first), *missing]))
            named = " and ".join(tokenizer.convert_ids_to_tokens(missing))
            base.say(f"generation also ends with {named}, which ends an answer of the chat template")

    def bind_loss(self, base: Base) -> None:
        from hfstrat.models import fused_loss, router_loss

        factor = router_loss.coefficient(base.model)
        if reason := fused_loss.bind_head_loss(base.model):
            base.say(f"the loss goes through the model's own logits, which takes more memory: {reason}")
            if factor:
                base.say("the load-balancing loss of the routers is not added, since it is computed with our own loss only")
        elif factor:
            base.say(f"the load-balancing loss of the routers is added in training, times {factor:g} (router_aux_loss_coef)")


@dataclass(frozen=True)
class TokenMetrics(Metrics):
    """Loss (nats per token), perplexity, token accuracy and, with a teacher, the divergence from it."""

    of_tokens: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "tokens", "teacher_kl")

    @property
    def quality(self) -> Quality:
        return Quality("loss", False, "nll", "items")

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        from hfstrat.tasks.causal_lm.losses import causal_lm_loss

        return causal_lm_loss(outputs, labels, num_items_in_batch)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        from hfstrat.tasks.causal_lm.losses import causal_lm_sums, sums_by_row

        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if "nll" not in outputs:
            return (causal_lm_sums(outputs["logits"], labels),)
        row = inputs["loss_rows"] // labels.shape[1]
        further = [outputs["kl"]] if "kl" in outputs else []
        return (sums_by_row(outputs["nll"], outputs["correct"], row, labels.shape[0], *further),)

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        found = self.score(sums, {})(np.ones(len(sums[0])))
        return {**found, "tokens": float(sums[0][:, 1].astype("float64").sum())}, {}

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        columns = self.columns(sums) | extra
        metrics = {
            "loss": lambda s: s["nll"] / max(s["items"], 1),
            "perplexity": lambda s: math.exp(min(s["nll"] / max(s["items"], 1), 700)),
            "token_accuracy": lambda s: s["right"] / max(s["items"], 1),
            "teacher_kl": lambda s: s["kl"] / max(s["items"], 1),
            "bits_per_byte": lambda s: s["nll"] / math.log(2) / max(s["bytes"], 1),
        }
        needed = {"teacher_kl": "kl", "bits_per_byte": "bytes"}
        return ratios(columns, {name: each for name, each in metrics.items() if needed.get(name, "nll") in columns})

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """`nll` over `items`, the tokens that are `right`, and `kl` (nats, summed) from a teacher, where there is one."""
        return dict(zip(("nll", "items", "right", "kl"), sums[0].astype("float64").T, strict=False))


class LanguageText(Text):
    """Predictions are greedy answers."""

    pipeline = "text-generation"
    unit = "token"
    generates = True

    def predict(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        from hfstrat.tasks.generation import answer

        return answer(model, data.renderer, prompt, max_new_tokens, dtype)

    def prompt(self, prompt: Any) -> str:
        from hfstrat.tasks.generation import prompt_text

        return prompt_text(prompt)

    def metrics(self, metrics: Values) -> str:
        loss, accuracy = metrics["loss"], metrics["token_accuracy"]
        return f"loss {loss:.4f}, perplexity {metrics['perplexity']:.2f}, token accuracy {accuracy:.1%}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f}, "
            f"token accuracy {before['token_accuracy']:.1%} -> {after['token_accuracy']:.1%}"
        )

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        inputs = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
        if chats:
            more = "".join(f" {name}={value!r}," for name, value in options.items())
            inputs = (
                'inputs = tokenizer.apply_chat_template(\n    [{"role": "user", "content": "Who are you?"}],\n'
                f'    add_generation_prompt=True, return_tensors="pt", return_dict=True,{more}\n)'
            )
        return [
            inputs,
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]


class CausalLM(Task):
    """The task `causal-lm`."""

    name = "causal-lm"
    rows = LanguageRows()
    model = LanguageModel()
    metrics = TokenMetrics()
    text = LanguageText()

    def check(self, recipe: Recipe) -> None:
        if recipe.model.pooling is not None:
            raise UserError("model.pooling: it is for models with a head for complete texts; remove it, or set task")
        if recipe.training.head_learning_rate is not None:
            raise UserError(
                "training.head_learning_rate: it is for the new head of a classifier, and a causal LM has none; remove it"
            )
