"""What is read from transformers' source text is what the imported library has, and it is read in one place only."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, TrainingArguments
from transformers.models.auto import modeling_auto

import hfstrat
from hfstrat.models import transformers_source as source

VERSION = transformers.__version__
ADVICE = f"hfstrat/models/transformers_source.py reads transformers {', '.join(source.TESTED)}; {VERSION} is installed and "


def check(agrees: bool, what: str) -> None:
    assert agrees, f"{ADVICE}{what}. Adapt that module, and add {VERSION} to its TESTED"


def test_fields_of_training_arguments() -> None:
    found, real = source.training_argument_names(), {field.name for field in fields(TrainingArguments) if field.init}
    check(found == real, f"the fields of TrainingArguments differ: {sorted(found ^ real)[:5]}")


@pytest.mark.parametrize(
    ("auto_class", "words"),
    [("AutoModelForCausalLM", "FOR_CAUSAL_LM"), ("AutoModelForSequenceClassification", "FOR_SEQUENCE_CLASSIFICATION")],
)
def test_families(auto_class: str, words: str) -> None:
    name = f"MODEL_{words}_MAPPING_NAMES"
    found, real = set(source.families_of(auto_class)), set(getattr(modeling_auto, name))
    check(len(found) > 50, f"modeling_auto.py has no {name} in the expected form")
    check(found <= real, f"{name} has no {sorted(found - real)[:5]}")
    check(len(real - found) < 10, f"{name} also has {sorted(real - found)[:10]}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "gemma", "opt", "mpt", "bert"])
def test_keys_and_defaults_of_configs(family: str) -> None:
    keys, real = source.config_keys(family), AutoConfig.for_model(family)
    check("vocab_size" in keys, f"the config class of {family} cannot be read")
    missing = [key for key in keys if not hasattr(real, key)]
    check(not missing, f"the config of {family} has no {missing[:5]}")
    check(source.attribute_map(family) == real.attribute_map, f"the attribute_map of {family} differs")
    if family == "llama":
        differ = {key for key, value in keys.items() if value is not None and getattr(real, key) != value}
        check(differ <= {"id2label", "label2id"}, f"defaults of {family} differ: {sorted(differ)[:5]}")


@pytest.mark.parametrize("content", ["", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {}\nclass TrainingArguments: pass\n"])
def test_other_text_gives_nothing(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten file makes a check return less; it raises nothing and invents nothing."""
    empty: Any = lambda file: content  # noqa: E731
    for name in ("families_of", "config_keys", "attribute_map"):
        monkeypatch.setattr(source, name, getattr(source, name).__wrapped__)
    monkeypatch.setattr(source, "_text", empty)
    assert source.training_argument_names() == set()
    assert source.families_of("AutoModelForCausalLM") == []
    assert source.config_keys("llama") == source.attribute_map("llama") == {}


def test_no_other_file_reads_the_source_of_a_library() -> None:
    root = Path(hfstrat.__file__).parent
    others = [file for file in root.rglob("*.py") if file.name not in ("transformers_source.py", "peft_source.py")]
    found = [file.name for file in others if re.search(r"submodule_search_locations|inspect\.getsource", file.read_text())]
    assert not found, found
