"""What is read from PEFT's source text agrees with the imported library; the schema and the messages come from it."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers.peft_types import TRAINED, strategy_of

from hfstrat.errors import UserError
from hfstrat.recipe import peft_source, stored
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.peft import REFUSED
from hfstrat.recipe.schema import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "strategies.md"


def loaded(strategy: dict[str, Any]) -> Any:
    recipe = {"model": "m", "strategy": strategy, "data": "d.jsonl", "output_dir": "o"}
    return load_recipe("r.yaml", text=json.dumps(recipe)).recipe


def plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def test_types_and_fields_are_those_of_the_installed_peft() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    hint = f"read from PEFT {peft_source.peft_version()}, tested with {peft_source.TESTED}"
    assert set(peft_source.types()) == {one.value for one in PeftType}, hint
    for one, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        known = {field.name: field for field in dataclasses.fields(config) if field.init and field.name not in peft_source.OURS}
        found = peft_source.fields(one.value)
        assert found.keys() == known.keys(), (one, hint)
        for name, field in known.items():
            if field.default is not dataclasses.MISSING and found[name].default is not ...:
                assert found[name].default == plain(field.default), (one, name, hint)


def test_every_type_is_trained_or_refused_and_documented() -> None:
    text = DOCS.read_text(encoding="utf-8").partition("\n## peft\n")[2].partition("\n## ")[0]
    assert {*TRAINED, *REFUSED} == set(peft_source.types())
    assert all(f"| {one} |" in text for one in peft_source.types())


@pytest.mark.parametrize("peft_type", REFUSED)
def test_a_refused_type_has_its_reason(peft_type: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(strategy_of(peft_type))
    assert REFUSED[peft_type] in str(caught.value)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"peft_type": "IA3", "targt_modules": ["a"]}, "no such key in strategy peft IA3; did you mean 'target_modules'?"),
        ({"peft_type": "VERA", "r": "big"}, 'strategy.r = "big": expected a whole number'),
        ({"peft_type": "IA3", "r": 4}, "strategy.r = 4: no such key in strategy peft IA3"),
        ({"peft_type": "IA4"}, "did you mean 'IA3'?"),
        ({}, "strategy.peft_type: missing"),
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens: PROMPT_TUNING needs it"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": True}, "prefix_projection: PEFT saves"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEX"}, "one of TEXT, SAMPLE_VOCAB"),
    ],
)
def test_a_mistake_in_a_field_is_a_sentence(strategy: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded({"name": "peft", **strategy})
    assert words in str(caught.value)


def test_the_schema_has_the_fields_of_each_type() -> None:
    validator = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    recipe = {"model": "m", "data": "d.jsonl", "output_dir": "o"}
    for one in TRAINED:
        assert validator.is_valid({**recipe, "strategy": strategy_of(one)}), one
    for wrong in (strategy_of("IA3", r=4), strategy_of("VERA", r="big"), {"name": "peft", "peft_type": "IA4"}):
        assert not validator.is_valid({**recipe, "strategy": wrong})


def test_a_field_that_is_given_with_its_default_is_no_change() -> None:
    """A resumed run may name what PEFT does anyway; another value is another run."""
    plain, named, other = (loaded(strategy_of("VERA", **more)).model_dump() for more in ({}, {"r": 256}, {"r": 8}))
    assert stored.compare(plain, named) == stored.compare(named, plain) == ([], [])
    assert stored.compare(plain, other)[1] == ["strategy.r was 256, is 8"]
