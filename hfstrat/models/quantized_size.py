"""Which layers of a model are quantized, and how many bytes they take."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.models.classifier_heads import CLASS_HEAD
from hfstrat.models.parameter_names import EMBEDDING, HEAD
from hfstrat.recipe.quantization import Quantization
from hfstrat.recipe.section import Shapes

if TYPE_CHECKING:
    pass


POSITIONS = re.compile(r"\.(?:wpe|\w*embeddings?)\.|(?:^|\.)embed_positions\.|(?:^|\.)shared\.")


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether a module, or one around it, has one of these names: whole, or the end of a whole one."""
    around = module.split(".")
    paths = [".".join(around[: depth + 1]) for depth in range(len(around))]
    return any(path == name or path.endswith(f".{name}") for path in paths for name in names)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer that is no head, told from its name."""
    other = (HEAD, CLASS_HEAD, EMBEDDING, POSITIONS)
    return name.endswith(".weight") and len(shape) == 2 and not any(pattern.search(name) for pattern in other)


def weight_bytes(shapes: Shapes, section: Quantization | None, learning: Iterable[str] = (), each: float = 2) -> int:
    """Bytes of a frozen model's weights in memory.

    Args:
        shapes: its parameters.
        learning: names of those that learn, and so are not quantized.
        each: bytes of a weight that is not quantized.
    """
    learning, total = set(learning), 0.0
    for name, shape in shapes.items():
        quantized = section is not None and is_linear(name, shape) and name not in learning
        if section is None or not quantized or is_named(name.removesuffix(".weight"), section.skip_modules):
            total += prod(shape) * each
        else:
            total += prod(shape) * section.bits / 8 + (4 * shape[0] if section.name == "int8" else 0)
    return int(total)


def check_quantizable(key: str, section: Quantization | None, source: str) -> None:
    if section is None:
        return
    if is_quantized_already(source):
        raise UserError(
            f"{key}: {section.name}: {source} is quantized already (quantization_config in its config.json); remove this, or "
            "name the model that it was made from"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}: {section.name} needs bitsandbytes: pip install 'hfstrat[quantization]'")


def is_quantized_already(source: str) -> bool:
    """Whether a local model's config says so."""
    from hfstrat.models.load import read_json

    return bool(source) and bool(read_json(Path(source).expanduser() / "config.json").get("quantization_config"))
