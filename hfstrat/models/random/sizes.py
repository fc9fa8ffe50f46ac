"""The sizes of a model (width, depth, heads, inner width) from its number of parameters; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models import transformers_source
from hfstrat.models.random import families
from hfstrat.recipe.section import UNITS

NARROWEST, WIDEST = 32, 16_384
ASPECT = (64.0, 128.0)  # width / depth: as in GPT-2 and Pythia; from 1B as in Llama. The loss hardly depends on it (2001.08361)
INNER = 8 / 3  # inner / outer width of a gated MLP, which has three matrices (arXiv 2002.05202); 4 for an ordinary one
EXACT, NEAR = 0.02, 0.05  # relative errors of the parameters: up to which shapes are equally good, and the maximum


def readable(count: float) -> str:
    """A number of parameters as a recipe writes it: 10.1M."""
    unit = next((unit for unit in "bmk" if count >= UNITS[unit]), "")
    return f"{count / UNITS[unit]:.3g}{unit.upper() if unit != 'k' else unit}"


def pick(family: str, wanted: int, vocab_size: int, positions: int, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config with about `wanted` parameters; those in `given` (by the family's names) are kept.

    The embeddings are tied: below about 500M, untied ones would be most of the model. Of all shapes within 2% of the number,
    the one with width / depth nearest to 64 (128 from 1B) is chosen.

    Raises:
        UserError: no shape is within 5%.
    """
    name = {key: families.common_name(family, key) for key in ("vocab_size", "max_position_embeddings", "tie_word_embeddings")}
    fixed = {
        name["vocab_size"]: vocab_size,
        name["max_position_embeddings"]: positions,
        name["tie_word_embeddings"]: True,
        **given,
    }
    own = given.keys() - name.values()
    found: tuple[float, dict[str, Any]] | None = None
    nearest: tuple[float, int] = (math.inf, 0)
    for settings in _candidates(family, wanted, fixed):
        count = count_parameters(family, settings)
        error = abs(count - wanted) / wanted
        nearest = min(nearest, (error, count))
        score = max(0.0, error - EXACT) * 100 + _shape_cost(family, settings, ASPECT[wanted >= 10**9])
        if error <= NEAR and (found is None or score < found[0]):
            found = score, settings
    if found is None:
        tables = vocab_size * NARROWEST
        why = f"its embeddings alone have {readable(tables)} at width {NARROWEST}" if tables > wanted / 2 else ""
        instead = "use a smaller vocabulary" if why or not own else "remove strategy.config"
        raise UserError(
            f"strategy.parameters: no {family} with {vocab_size:,} tokens{' and this config' if own else ''} has about "
            f"{readable(wanted)} parameters; the nearest has {readable(nearest[1])}{f' ({why})' if why else ''}. Use that "
            f"number, or {instead}"
        )
    return found[1]


def count_parameters(family: str, settings: dict[str, Any]) -> int:
    """The number of parameters, from the shapes of one and of two blocks: all blocks are equal."""
    depth = families.common_name(family, "num_hidden_layers")
    one, two = (sum(map(prod, (families.shapes_of(family, {**settings, depth: n}) or {}).values())) for n in (1, 2))
    return one + (int(settings[depth]) - 1) * (two - one)


def _candidates(family: str, wanted: int, fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    keys = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    width_key, heads_key, depth_key = (families.common_name(family, key) for key in keys)
    inner_key = "n_inner" if family == "gpt2" else "intermediate_size"
    known = transformers_source.config_keys(family)
    for width in [fixed[width_key]] if width_key in fixed else _widths():
        each = 128 if width >= 2048 else 64 if width >= 512 else 32 if width >= 128 else 16
        heads = fixed.get(heads_key) or max(1, width // each)
        settings = {**fixed, width_key: width, heads_key: heads}
        if width % heads:
            continue
        if "num_key_value_heads" in known:
            settings.setdefault("num_key_value_heads", heads)
        if "head_dim" in known:
            settings.setdefault("head_dim", width // heads)
        for inner in [fixed[inner_key]] if inner_key in fixed else _inners(family, width):
            shape = {**settings, inner_key: inner}
            one, two = (count_parameters(family, {**shape, depth_key: n}) for n in (1, 2))
            guess = 1 + (wanted - one) / (two - one)
            for depth in [fixed[depth_key]] if depth_key in fixed else {math.floor(guess), math.ceil(guess)}:
                if 1 <= depth <= 256 and (depth > 1 or depth_key in fixed):
                    yield {**shape, depth_key: depth}


def _widths() -> Iterator[int]:
    width = NARROWEST
    while width <= WIDEST:
        yield width
        width += 16 if width < 64 else 32 if width < 512 else 64 if width < 2048 else 128


def _inners(family: str, width: int) -> list[int]:
    middle = 4 * width if family == "gpt2" else INNER * width
    step = 8 if width < 128 else 16 if width < 256 else 32
    return sorted({round(middle * share / step) * step for share in (0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15)})


def _shape_cost(family: str, settings: dict[str, Any], aspect: float) -> float:
    keys = ("hidden_size", "num_hidden_layers")
    width, depth = (settings[families.common_name(family, key)] for key in keys)
    inner, middle = (settings["n_inner"], 4) if family == "gpt2" else (settings["intermediate_size"], INNER)
    return abs(math.log(width / depth / aspect)) + abs(math.log(inner / width / middle))


def describe(family: str, settings: dict[str, Any]) -> str:
    """A line about the sizes that were chosen."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    width, depth, heads = (settings[families.common_name(family, key)] for key in keys)
    inner = settings["n_inner"] if family == "gpt2" else settings["intermediate_size"]
    tables = settings[families.common_name(family, "vocab_size")] * width
    count = count_parameters(family, settings)
    return (
        f"{family} of {count:,} parameters: {depth} layers of width {width}, {heads} heads, inner width {inner}, "
        f"{'tied' if families.is_tied(family, settings) else 'untied'} embeddings of {tables:,} ({tables / count:.0%})"
    )
