"""`model.quantization` and a teacher's: frozen weights in 8 or 4 bits. What can be said of it without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfstrat.recipe.section import Section

Form = Literal["int8", "nf4", "fp4"]


BLOCK, NESTED = 64, 256  # weights per scale; scales per second-level scale with use_double_quant


class Quantization(Section):
    """Linear layers of the frozen model in 8 or 4 bits, by bitsandbytes. Trainable parameters are never quantized."""

    name: Form = Field(description="int8 (arXiv 2208.07339); nf4, for normally distributed weights, or fp4 (arXiv 2305.14314)")
    use_double_quant: bool = Field(True, description="nf4 and fp4: quantize the scales too, which saves 0.37 bits per weight")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="nf4 and fp4: dtype of the matrix products; auto: model.dtype"
    )
    skip_modules: list[str] = Field(
        [], description="Modules that are not quantized, in addition to heads and trainable modules"
    )

    @model_validator(mode="after")
    def _four_bits_only(self) -> Quantization:
        for key in ("use_double_quant", "compute_dtype"):
            if self.name == "int8" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: for nf4 and fp4 only (int8 has one scale per row and computes in model.dtype); remove it"
                )
        return self

    @property
    def bits(self) -> float:
        """Bits per quantized weight, with its share of the scales (int8: one more float32 per row, not counted here)."""
        if self.name == "int8":
            return 8.0
        return 4 + (8 + 32 / NESTED) / BLOCK if self.use_double_quant else 4 + 32 / BLOCK

    def as_bitsandbytes(self, compute: str, skipped: list[str]) -> dict[str, Any]:
        """The arguments of a `BitsAndBytesConfig` as JSON values."""
        if self.name == "int8":
            return {"load_in_8bit": True, "llm_int8_skip_modules": skipped}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.use_double_quant,
            "bnb_4bit_compute_dtype": compute if self.compute_dtype == "auto" else self.compute_dtype,
            "llm_int8_skip_modules": skipped,
        }


FromName = BeforeValidator(
    lambda value: {"name": value} if isinstance(value, str) else value, json_schema_input_type=Quantization | Form | None
)
