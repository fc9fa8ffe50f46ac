"""What is read from the source text of the installed transformers, because importing it takes seconds.

This is the only place that depends on how its files are written: the auto mappings (which families a class can load), the
configuration classes (keys and defaults) and TrainingArguments (fields). `tests/models/test_transformers_source.py` compares
each of these with the imported library and names the version if they no longer agree. Where a file is not as expected, the
functions return nothing, and transformers itself decides when the model is built.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

TESTED = ("5.23.0",)  # the versions of transformers whose files are known to be read correctly


@lru_cache
def _folder() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@lru_cache
def _text(file: str) -> str:
    """The text of a file of transformers; empty if it does not exist."""
    folder = _folder()
    return (folder / file).read_text(encoding="utf-8") if folder and (folder / file).is_file() else ""


def training_argument_names() -> set[str]:
    """The fields of TrainingArguments; empty if they cannot be read."""
    return set(re.findall(r"^    (\w+): [^\n]*= field\((?:default|$)", _text("training_args.py"), re.MULTILINE))


@lru_cache
def families_of(auto_class: str) -> list[str]:
    """The `model_type` of every family that this auto class can build; empty if they cannot be read."""
    words = re.sub("([a-z])([A-Z])", r"\1_\2", auto_class.removeprefix("AutoModel")).upper()
    return list(_mapping("models/auto/modeling_auto.py", f"MODEL_{words}_MAPPING_NAMES"))


def _mapping(file: str, name: str) -> dict[str, str]:
    """The pairs of the OrderedDict `name` in a file."""
    body = re.search(rf"^{name} = OrderedDict\(\n    \[\n(.*?)^    \]\n\)", _text(file), re.MULTILINE | re.DOTALL)
    return dict(re.findall(r'\("([^"]+)",\s*"([^"]+)"\)', body.group(1))) if body else {}


@lru_cache
def config_keys(family: str) -> dict[str, Any]:
    """The keys of a family's config with their defaults (None if a default is not a literal); empty if they cannot be read."""
    fields = _config_class(family)[0]
    common = _class("configuration_utils.py", "PreTrainedConfig")[0]
    return {**common, **fields} if fields else {}


@lru_cache
def attribute_map(family: str) -> dict[str, str]:
    """Common names of config keys mapped to the family's own: GPT-2 calls `hidden_size` n_embd."""
    return _config_class(family)[1]


def _config_class(family: str) -> tuple[dict[str, Any], dict[str, str]]:
    name = _mapping("models/auto/auto_mappings.py", "CONFIG_MAPPING_NAMES").get(family)
    special = _mapping("models/auto/auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    module = special.get(family, family).replace("-", "_")
    return _class(f"models/{module}/configuration_{module}.py", name) if name else ({}, {})


def _class(file: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The annotated fields of a class with their defaults, and its `attribute_map`."""
    body = next((node.body for node in ast.parse(_text(file)).body if isinstance(node, ast.ClassDef) and node.name == name), [])
    fields, names = dict[str, Any](), dict[str, str]()
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not ast.unparse(node.annotation).startswith("ClassVar"):
                fields[node.target.id] = _literal(node.value)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "attribute_map":
            names = dict(_literal(node.value) or {})
    return fields, names


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
