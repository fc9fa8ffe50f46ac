"""Decoders with an LM head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.base import Model

if TYPE_CHECKING:
    from hfstrat.models.load import Base

OTHER_HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


class LanguageModel(Model):
    """AutoModelForCausalLM, with our loss bound to its forward."""

    peft_type = "CAUSAL_LM"
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

    def shapes(self, shapes: dict[str, Any], config: dict[str, Any], labels: int) -> tuple[dict[str, Any], bool] | None:
        return shapes, bool(config.get("tie_word_embeddings", False))

    def bind_loss(self, base: Base) -> None:
        from hfstrat.models import fused_loss, router_loss

        factor = router_loss.coefficient(base.model)
        if reason := fused_loss.bind_head_loss(base.model):
            base.say(f"the loss goes through the model's own logits, which takes more memory: {reason}")
            if factor:
                base.say("the load-balancing loss of the routers is not added, since it is computed with our own loss only")
        elif factor:
            base.say(f"the load-balancing loss of the routers is added in training, times {factor:g} (router_aux_loss_coef)")
