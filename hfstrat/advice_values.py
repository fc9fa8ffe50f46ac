"""What a value of a recipe is expected to be, in words, and what to write instead of one that it cannot have."""

from __future__ import annotations

import json
import types
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

SWITCHES = {"true": "true", "on": "true", "yes": "true", "false": "false", "off": "false", "no": "false"}


def expected(field: FieldInfo) -> str:
    """What a field takes, in words."""
    limits = {type(item).__name__: item for item in field.metadata}
    text = in_words(field.annotation)
    if "MinLen" in limits:
        text += " that is not empty"
    for kind, attribute, words in (
        ("Ge", "ge", "at least"),
        ("Gt", "gt", "more than"),
        ("Le", "le", "at most"),
        ("Lt", "lt", "less than"),
    ):
        if kind in limits:
            text += f", {words} {getattr(limits[kind], attribute)}"
    return text


def instead(value: Any, kinds: set[str], field: FieldInfo | None) -> str:
    """What to write in place of a value that pydantic did not accept for these reasons; empty where nobody knows."""
    if value is None:
        return "remove the key to get its default" if field is None or not field.is_required() else ""
    if value == -1 and field is not None and field.default is None:
        return "remove the key to set none"
    if isinstance(value, str):
        return _for_text(value, kinds, field)
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    if "string_type" in kinds and isinstance(value, int | float):
        return f'put it in quotes: "{json.dumps(value)}"'
    return ""


def _for_text(value: str, kinds: set[str], field: FieldInfo | None) -> str:
    if "bool_type" in kinds and value.lower() in SWITCHES:
        return f"write {SWITCHES[value.lower()]}, without quotes"
    if kinds & {"int_type", "float_type"} and (number := _number(value)):
        return number
    if "literal_error" in kinds and field is not None and (near := nearest(value, _choices(field.annotation))):
        return f"did you mean '{near}'?"
    return f"write a list: [{value}]" if "list_type" in kinds else ""


def nearest(value: str, choices: list[str]) -> str | None:
    """The choice that was meant: one that begins like it, or is spelt much like it."""
    value = value.lower()
    longer = [choice for choice in choices if len(value) > 2 and choice.startswith(value)]
    return next(iter(longer or get_close_matches(value, choices, n=1, cutoff=0.5)), None)


def _choices(annotation: Any) -> list[str]:
    options = [annotation, *get_args(annotation)]
    return [str(arg) for option in options if get_origin(option) is Literal for arg in get_args(option)]


def _number(text: str) -> str:
    """How a text that looks like a number is written as one."""
    bare = text.strip().replace("_", "").replace(",", "")
    try:
        number = float(bare.removesuffix("%"))
    except ValueError:
        return ""
    if bare.endswith("%"):
        return f"write {number / 100:g}"
    return "it is quoted: remove the quotes" if bare == text else f"write {bare}"


def in_words(annotation: Any) -> str:
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(args[0])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        kept = [arg for arg in args if arg is not type(None) and not (arg is int and float in args)]
        return " or ".join(in_words(arg) for arg in kept)
    if origin is list:
        return f"a list, each {in_words(args[0])}"
    if origin is dict:
        return "a mapping"
    return "a mapping of keys"
