"""The section of `strategy: peft`: any type of the installed PEFT, with the fields of its configuration class.

The fields are those of PEFT, so a recipe file has them beside `peft_type`. Their names and types are checked here, their values
by PEFT itself in the checks before training (`hfstrat/strategies/peft.py`).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from hfstrat.recipe import peft_source
from hfstrat.recipe.section import Default
from hfstrat.recipe.strategies import StrategySection

PER_TASK = "it has weights for several tasks and needs the task of each example, which the data do not have"
REFUSED = {  # types that PEFT has and hfstrat does not train, and why
    "LORA": "write `strategy: lora`, which has its keys, defaults and checks",
    "XLORA": "it mixes LoRA adapters that exist already, by their folders; train one with `strategy: lora`",
    "POLY": PER_TASK,
    "MULTITASK_PROMPT_TUNING": PER_TASK,
    "CPT": "it replaces the loss by one of its own, over token types that the data do not have; PROMPT_TUNING does not",
    "ADALORA": "its ranks are allocated by a call after each step, from averages of gradients that PEFT keeps outside of the "
    "model and does not save, so a resumed run would differ; its regularization is added to the loss of each forward pass, so "
    "accumulated batches would have several times that of one large batch; write `strategy: lora`",
    "SHADOW": "PEFT declares parameters of the last block trainable that no output depends on, so they would never move",
}
EMBEDDED = ("PROMPT_TUNING", "P_TUNING")  # virtual tokens before the embeddings of a text
CACHED = ("PREFIX_TUNING", "CARTRIDGE")  # virtual tokens as keys and values of each block
UNMERGED = (*EMBEDDED, *CACHED, "ADAPTION_PROMPT", "LILY")  # what PEFT cannot make part of the base's weights
REQUIRED = {  # fields without which PEFT fails, and with what to begin
    **{key: {"num_virtual_tokens": "20"} for key in (*EMBEDDED, *CACHED)},
    "ADAPTION_PROMPT": {"adapter_len": "10", "adapter_layers": "the number of upper blocks to adapt, such as 8"},
    "TRAINABLE_TOKENS": {"token_indices": "a list of token ids, such as [1, 2]"},
}
COMPARISON = "PEFT's method comparison on MetaMathQA with Llama 3.2 3B (method_comparison/MetaMathQA in its repository)"
USUAL = 1e-4  # of that comparison, where an experiment sets none
RATES = {  # of its experiments that set one
    "ADAPTION_PROMPT": 5e-4,
    "C3A": 3e-1,
    "GLORA": 5e-4,
    "GRALORA": 2e-4,
    "HIRA": 4.5e-3,
    "IA3": 5e-3,
    "LOKR": 3e-3,
    "OSF": 5e-5,
    "PREFIX_TUNING": 1e-3,
    "PROMPT_TUNING": 1e-3,
    "ROAD": 1e-3,
    "SHIRA": 3e-4,
    "TINYLORA": 1e-3,
    "UNILORA": 2e-3,
    "VBLORA": 5e-4,
}


class Peft(StrategySection):
    """Any other adapter of PEFT is trained, the base model is frozen: IA3, VERA, OFT, LOHA, PROMPT_TUNING and others.

    Further keys are the fields of the type's configuration class in the installed PEFT, with its names and defaults.
    """

    model_config = ConfigDict(extra="allow")
    variants: ClassVar[str] = "peft_type"
    name: Literal["peft"]
    peft_type: str = Field(description="PEFT's name of the method, such as IA3, VERA, OFT, LOHA, LN_TUNING or PROMPT_TUNING")

    @classmethod
    def fields_of(cls, variant: str | None) -> dict[str, FieldInfo]:
        known = peft_source.section_of(variant).model_fields if variant in peft_source.types() else {}
        return {**cls.model_fields, **known}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The fields of each type of the installed PEFT, as conditions on `peft_type`."""
        found: dict[str, Any] = handler(core_schema)
        schema = handler.resolve_ref_schema(found)
        schema.pop("additionalProperties", None)
        types = supported()
        schema["properties"]["peft_type"]["enum"] = types
        schema["allOf"] = [
            {
                "if": {"properties": {"peft_type": {"const": one}}, "required": ["peft_type"]},
                "then": {"properties": _properties(peft_source.section_of(one)), "required": list(REQUIRED.get(one, {}))},
            }
            for one in types
        ]
        schema["unevaluatedProperties"] = False
        return found

    @field_validator("peft_type")
    @classmethod
    def _is_one_of_peft(cls, value: str) -> str:
        if value in REFUSED:
            raise ValueError(f"{value} is not trained here: {REFUSED[value]}")
        if value not in (types := supported()):
            near = get_close_matches(value.upper(), types, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"no such type in PEFT {peft_source.peft_version()}; expected one of {', '.join(types)}{hint}")
        return value

    @model_validator(mode="after")
    def _has_the_fields_of_its_type(self) -> Peft:
        peft_source.section_of(self.peft_type).model_validate(self.options)  # its errors have the paths of these keys
        if self.options.get("prefix_projection"):
            raise ValueError(
                "prefix_projection: PEFT saves what the projection computes and not the projection, so a stopped run would not "
                "resume; set false"
            )
        for key, example in REQUIRED.get(self.peft_type, {}).items():
            if self.options.get(key) in (None, []):
                raise ValueError(f"{key}: {self.peft_type} needs it, and PEFT has no default; set it to {example}")
        return self

    @property
    def title(self) -> str:
        return f"{self.name} {self.peft_type}"

    @property
    def options(self) -> dict[str, Any]:
        """The given fields of PEFT's configuration."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def option_defaults(self) -> dict[str, Any]:
        return {name: one.default for name, one in peft_source.fields(self.peft_type).items() if one.default is not ...}

    @property
    def virtual_tokens(self) -> int:
        """The number of virtual tokens that a text gets in front, as embeddings or in the cache."""
        return int(self.options.get("num_virtual_tokens") or 0)

    @property
    def packs(self) -> bool:
        return not self.virtual_tokens  # only the first example of a row would have them in front

    @property
    def unquantizable(self) -> str:
        if self.virtual_tokens or peft_source.quantizes(self.peft_type):
            return ""
        able = ", ".join(one for one in supported() if peft_source.quantizes(one))
        return (
            f"PEFT {peft_source.peft_version()} has no {self.peft_type} for layers that bitsandbytes quantized; use {able}, "
            "one with virtual tokens, or strategy lora"
        )

    def training_defaults(self) -> dict[str, Default]:
        rate = RATES.get(self.peft_type)
        own = f"{COMPARISON}: {'its experiment' if rate else 'its default'} with {self.peft_type}"
        found = {"learning_rate": Default(rate or USUAL, own)}
        if self.peft_type in CACHED:
            found["activation_checkpointing"] = Default(False, "recomputed blocks would extend the cache that holds the prefix")
        return found


def supported() -> list[str]:
    """The types of the installed PEFT that are trained here."""
    return [one for one in peft_source.types() if one not in REFUSED]


def _properties(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = model.model_json_schema(mode="validation")["properties"]
    return found
