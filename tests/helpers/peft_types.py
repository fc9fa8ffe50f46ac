"""The smallest options with which each type of PEFT fits a model of width 32, as the tests make it."""

from __future__ import annotations

from typing import Any

from hfstrat.recipe.peft import CACHED, EMBEDDED, REFUSED
from hfstrat.recipe.peft_source import types

OPTIONS: dict[str, dict[str, Any]] = {
    **{key: {"num_virtual_tokens": 3} for key in (*EMBEDDED, *CACHED)},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 10},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 7, *range(270, 300)]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 10},
}
TRAINED = [one for one in types() if one not in REFUSED]


def strategy_of(peft_type: str, **more: Any) -> dict[str, Any]:
    """The strategy's section."""
    return {"name": "peft", "peft_type": peft_type, **OPTIONS.get(peft_type, {}), **more}
