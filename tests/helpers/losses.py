"""Models and batches for tests of losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


# Whole models


def family(name: str, **more: Any) -> Any:
    """A tiny random float64 model of a family with a special head."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    common |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5, **more}
    config = getattr(transformers, f"{name}Config")(**common)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float64)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def some_rows(lengths: tuple[int, ...] = (5, 9, 14, 30, 31, 6, 22, 12)) -> list[dict[str, Any]]:
    """Unequal lengths, unequal shares of supervised tokens, one row with none."""
    source = torch.Generator().manual_seed(2)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 97, (length,), generator=source).tolist()
        prompt = length if index == 5 else length // 2
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def count(rows: list[dict[str, Any]]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def assert_same(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    """Equal up to rounding in the norms, which these models compute in float32 although their weights are float64."""
    assert found[0] == pytest.approx(expected[0], rel=1e-7)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-6 * float(gradient.norm()) + 1e-12, name
