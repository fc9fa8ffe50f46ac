"""What can be known to be wrong with a model that does not exist yet: its family, its config, its class. No torch."""

from __future__ import annotations

import ast
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.scratch import families

COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def check_family(family: str, key: str, auto_class: str, settings: dict[str, Any]) -> None:
    """Raises UserError for a family that transformers has no model of for the task, or a causal LM that would see ahead."""
    known, causal = families.families_of(auto_class), auto_class == "AutoModelForCausalLM"
    kind, such = ("causal LM", "llama, qwen3, mistral or gpt2") if causal else ("classifier", "bert, modernbert or llama")
    if known and family not in known:
        near = get_close_matches(family.lower(), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one such as {such}"
        raise UserError(f"{key}: {family}: this transformers has no {kind} of that family; {hint}")
    if causal and families.reads_both_ways(family, settings):
        raise UserError(
            f"{key}: {family} reads in both directions, so that as a causal LM it would see the token it has to predict; "
            f"expected one such as {such}"
        )


def check_keys(family: str, config: dict[str, Any]) -> None:
    """Raises UserError for a key that the family's config does not have; transformers would keep it and read it nowhere."""
    known = families.config_keys(family)
    for key in families.canonical(family, config) if known else []:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(list(known)[10:])}"
            raise UserError(f"strategy.config.{key}: the config of {family} has no such key; {hint}")
    positive = {families.common_name(family, name) for name in COUNTS}
    for key, value in config.items():
        name = families.common_name(family, key)
        if name in positive and value is not None and (type(value) is not int or value < 1):
            raise UserError(f"strategy.config.{key}: {value}: expected a whole number, at least 1")


def check_heads(family: str, settings: dict[str, Any]) -> None:
    """Raises UserError for a width that its heads do not divide, or heads that share keys unevenly."""
    whole = {**families.config_keys(family), **settings}
    width_key, heads_key = (families.common_name(family, key) for key in ("hidden_size", "num_attention_heads"))
    width, heads, shared = whole.get(width_key), whole.get(heads_key), whole.get("num_key_value_heads")
    if not (isinstance(width, int) and isinstance(heads, int)) or min(width, heads) < 1:
        return
    if width % heads and not settings.get("head_dim"):
        raise UserError(
            f"strategy.config.{heads_key}: {heads} heads do not divide {width_key} = {width}; "
            f"a width of {max(1, round(width / heads)) * heads} or {_divisor(width, heads)} heads would do"
        )
    if isinstance(shared, int) and shared > 0 and heads % shared:
        given = "num_key_value_heads" if "num_key_value_heads" in settings else heads_key
        raise UserError(
            f"strategy.config.{given}: {heads} heads cannot share {shared} heads of keys and values (num_key_value_heads); "
            f"{_divisor(heads, shared)} would do"
        )


def _divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def read_stored(source: str) -> dict[str, Any] | None:
    """The config of a local folder or file; None for a Hub id.

    Raises:
        UserError: it is no JSON object, or has no model_type.
    """
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.exists():
            raise UserError(f"model.name_or_path: {source} has no config.json")
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"model.name_or_path: {file} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise UserError(f"model.name_or_path: {file}: expected a JSON object with a model_type, as transformers saves it")
    return config


def count_tokens(folder: Path, added: list[str]) -> int | None:
    """Tokens of a tokenizer from its tokenizer.json, with those that are added to it; None if there is no such file."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        words = set(vocabulary) if isinstance(vocabulary, dict) else {word for word, _ in vocabulary}
        return len(words | {token["content"] for token in content.get("added_tokens") or []} | set(added))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def split_class(text: str) -> tuple[Path, str]:
    """`file.py:Class`. Raises ValueError for anything else."""
    file, sign, name = text.rpartition(":")
    if not sign or not file.endswith(".py") or not name.isidentifier():
        raise ValueError("model_class: expected a local file and a class in it, such as my_model.py:TinyModel")
    return Path(file).expanduser(), name


def check_class(text: str) -> None:
    """Raises UserError for a file that is not there or no Python, or that has no such class."""
    file, name = split_class(text)
    if not file.is_file():
        near = get_close_matches(file.name, [path.name for path in file.parent.glob("*.py")], n=1)
        hint = f"did you mean {file.parent / near[0]}?" if near else f"looked in {file.parent.resolve()}"
        raise UserError(f"strategy.model_class: {file}: no such file; {hint}")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"strategy.model_class: {file} is no valid Python: {error}") from None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if name not in classes:
        near = get_close_matches(name, classes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(classes) or 'none'}"
        raise UserError(f"strategy.model_class: {file} has no class {name}; {hint}")
