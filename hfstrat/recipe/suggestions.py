"""Answers to a key or a value that a recipe cannot have: the nearest right name, and what to write."""

from __future__ import annotations

import json
import types
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hfstrat.recipe import foreign, stored
from hfstrat.recipe.foreign import OURS, VALUES, as_text
from hfstrat.recipe.schema import OBJECTIVES, STRATEGIES, UNIONS, Recipe

IN_SHORT = {  # sections that may be given as one text
    "model": "a Hub id or a model folder, or a mapping with name_or_path",
    "strategy": f"one of {', '.join(STRATEGIES)}, or a mapping with name",
    "objective": f"one of {', '.join(OBJECTIVES)}, or a mapping with name",
    "data": "a file, a folder or a Hub id, or a mapping with train",
}
Names = dict[str, str]
"""The names of the sections that are one of several: {strategy: lora, objective: dpo}; and, by its dotted key, the value that
decides which keys such a section has."""


@cache
def sections_of(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[type[BaseModel]]]:
    """Every section of the recipe by its path; `strategy` and `objective` have several classes."""
    found: dict[tuple[str, ...], list[type[BaseModel]]] = {prefix: [model]}
    for name, field in model.model_fields.items():
        for cls in UNIONS[name].values() if name in UNIONS else sections_in(field.annotation):
            for path, inner in sections_of(cls, (*prefix, name)).items():  # type: ignore[arg-type]
                found.setdefault(path, []).extend(inner)
    return found


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may be, or that it is a list of."""
    if get_origin(annotation) is not None:
        return [section for one in get_args(annotation) for section in sections_in(one)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _chosen(section: tuple[str, ...], names: Names) -> dict[str, FieldInfo] | None:
    """The keys of a section that is one of several, if its name is known."""
    cls = UNIONS[section[0]].get(names.get(section[0], "")) if len(section) == 1 and section[0] in UNIONS else None
    return None if cls is None else cls.fields_of(names.get(f"{section[0]}.{cls.variants}"))


def field_of(path: tuple[str, ...], names: Names) -> FieldInfo | None:
    """The field at a dotted path, if there is one."""
    chosen = _chosen(path[:-1], names)
    several = [cls.model_fields for cls in sections_of(Recipe).get(path[:-1], [])]
    for fields in [chosen] if chosen is not None else several:
        if path[-1] in fields:
            return fields[path[-1]]
    return None


def wanted(path: tuple[str, ...], names: Names) -> str:
    """The value that is expected at a dotted path, in words."""
    if len(path) == 1 and path[0] in IN_SHORT:
        return IN_SHORT[path[0]]
    if field := field_of(path, names):
        return expected(field)
    mapping = field_of(path[:-1], names) if len(path) > 1 else None
    arguments = get_args(mapping.annotation) if mapping else ()
    return in_words(arguments[-1]) if arguments else "a mapping of keys"


# keys that do not exist


def place_and_keys(path: tuple[str, ...], names: Names) -> tuple[str, list[str]]:
    """The section of a key in words, and the keys that it may have."""
    parent = tuple(part for part in path[:-1] if not part.isdigit())  # without places in a list
    if (chosen := _chosen(parent, names)) is not None:
        variant = names.get(f"{parent[0]}.{UNIONS[parent[0]][names[parent[0]]].variants}", "")
        return " ".join(filter(None, (*parent, names[parent[0]], variant))), sorted(chosen)
    keys = {name for cls in sections_of(Recipe).get(parent, []) for name in cls.model_fields}
    return f"'{'.'.join(parent)}'" if parent else "a recipe", sorted(keys)


def unknown_key(path: tuple[str, ...], value: Any, names: Names, recipe: dict[str, Any]) -> str:
    """The answer to a key that does not exist where it was given: what to write instead.

    Args:
        recipe: the whole recipe as it was given, for answers that depend on other keys.
    """
    place, allowed = place_and_keys(path, names)
    key, parent = path[-1], tuple(part for part in path[:-1] if not part.isdigit())
    of_another = _owner(key, parent, names) if parent == ("objective",) else ""  # beta is GKD's elsewhere
    hint = _renamed(path, value, recipe) or of_another or foreign.instead_of(key, value, recipe)
    hint = hint or _nearest(key, parent, names, allowed)
    return f"no such key in {place}; {hint}"


def _renamed(path: tuple[str, ...], value: Any, recipe: dict[str, Any]) -> str:
    """What to write for a key that had this name in an earlier version; empty for others."""
    section: Any = recipe
    for part in path[:-1]:
        section = section.get(part, {}) if isinstance(section, dict) else {}
    if len(path) < 2 or not isinstance(section, dict):
        return ""
    new = stored.new_name(stored.section_of(path[-2], section), path[-1], value)
    return (
        ""
        if new is None or new[0] == path[-1]
        else f"it is now `{'.'.join((*path[:-1], new[0]))}: {as_text(new[1], lower=False)}`"
    )


def _owner(key: str, parent: tuple[str, ...], names: Names) -> str:
    """Which other strategies or objectives have this key, in words; empty for none."""
    union = parent[0] if len(parent) == 1 and parent[0] in UNIONS else ""
    others = UNIONS.get(union, {}).items()
    owners = [name for name, cls in others if key in cls.model_fields and name != names.get(union)]
    return f"it belongs to {union} {' and '.join(filter(None, (', '.join(owners[:-1]), owners[-1])))}" if owners else ""


def _nearest(key: str, parent: tuple[str, ...], names: Names, allowed: list[str]) -> str:
    if near := get_close_matches(key, allowed, n=1, cutoff=0.8):
        return f"did you mean '{near[0]}'?"
    if of_another := _owner(key, parent, names):
        return of_another
    if parent[-1:] == (key,):
        return f"the section is named twice; write '{'.'.join(parent)}' once"
    if key == "model" and "name_or_path" in allowed:
        return "did you mean 'name_or_path'?"
    if (homes := _homes(key)) and parent not in homes:
        return f"did you mean '{'.'.join((*homes[0], key))}'?"
    if key in OURS:
        return f"hfstrat calls it '{OURS[key]}'"
    if near := get_close_matches(key, allowed, n=1, cutoff=0.6):
        return f"did you mean '{near[0]}'?"
    sections = reversed(sections_of(Recipe).items())  # an outer section's key takes precedence over an inner one's
    everywhere = {name: path for path, classes in sections for cls in classes for name in cls.model_fields}
    if near := get_close_matches(key, [*everywhere, *OURS], n=1, cutoff=0.75):
        return f"did you mean '{OURS.get(near[0]) or '.'.join((*everywhere[near[0]], near[0]))}'?"
    return "`hfstrat schema` lists every key; other TrainingArguments go under training.extra"


def _homes(key: str) -> list[tuple[str, ...]]:
    found = [path for path, classes in sections_of(Recipe).items() if any(key in cls.model_fields for cls in classes)]
    return sorted(found, key=len)  # an outer section's key takes precedence over an inner one's


# values that do not fit

SWITCHES = {"true": "true", "on": "true", "yes": "true", "false": "false", "off": "false", "no": "false"}


def expected(field: FieldInfo) -> str:
    """The values that a field takes, in words."""
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


def instead(path: tuple[str, ...], value: Any, kinds: set[str], field: FieldInfo | None) -> str:
    """What to write in place of a value that pydantic refused for these reasons; empty where it is unknown."""
    if answer := VALUES.get(".".join(path), {}).get(as_text(value)):
        return answer
    if value is None:
        return "remove the key to get its default" if field is None or not field.is_required() else ""
    if value == -1 and field is not None and field.default is None:
        return "remove the key to set none"
    sections = sections_in(field.annotation) if field is not None else []
    if sections and len(path) > 1 and not isinstance(value, list | dict):
        return _in_section(".".join(path), value, sections[0])
    if isinstance(value, str):
        return _for_text(value, kinds, field)
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    if "string_type" in kinds and isinstance(value, int | float):
        return f'put it in quotes: "{json.dumps(value)}"'
    return ""


def _in_section(dotted: str, value: Any, section: type[BaseModel]) -> str:
    """A value that was given for a whole section, under the first key that takes it."""
    for given in ({}, *({name: value} for name in section.model_fields)):
        if not given and value is not True:  # `true` switches a section on with its defaults
            continue
        try:
            section.model_validate(given)
        except ValidationError:
            continue
        inner = ", ".join(f"{name}: {as_text(one, lower=False)}" for name, one in given.items())
        return f"write `{dotted}: {{{inner}}}`"
    return ""


def _for_text(value: str, kinds: set[str], field: FieldInfo | None) -> str:
    if "bool_type" in kinds and value.lower() in SWITCHES:
        return f"write {SWITCHES[value.lower()]}, without quotes"
    if kinds & {"int_type", "float_type"} and (number := _number(value)):
        return number
    if "literal_error" in kinds and field is not None and (near := nearest(value, choices_of(field.annotation))):
        return f"did you mean '{near}'?"
    return f"write a list: [{value}]" if "list_type" in kinds else ""


def nearest(value: str, choices: list[str]) -> str | None:
    """The choice that was probably meant: one that begins like it, or is spelled much like it."""
    value = value.lower()
    longer = [choice for choice in choices if len(value) > 2 and choice.startswith(value)]
    return next(iter(longer or get_close_matches(value, choices, n=1, cutoff=0.5)), None)


def choices_of(annotation: Any) -> list[str]:
    options = [annotation, *get_args(annotation)]
    return [str(arg) for option in options if get_origin(option) is Literal for arg in get_args(option)]


def _number(text: str) -> str:
    """What to write for a text that looks like a number."""
    bare = text.strip().replace("_", "").replace(",", "")
    try:
        number = float(bare.removesuffix("%"))
    except ValueError:
        return ""
    if bare.endswith("%"):
        return f"write {number / 100:g}"
    return "it is quoted: remove the quotes" if bare == text else f"write {bare}"


FEW = 8  # keys of a section that are listed where it is expected


def in_words(annotation: Any) -> str:
    """A type in words."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next((item.description for item in args[1:] if getattr(item, "description", None)), in_words(args[0]))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(as_text(arg, lower=False) for arg in args)
    if origin in (Union, types.UnionType):
        kept = [arg for arg in args if arg is not type(None) and not (arg is int and float in args)]
        return " or ".join(in_words(arg) for arg in kept)
    if origin is list:
        return f"a list, each {in_words(args[0])}"
    if origin is dict:
        return "a mapping"
    names = list(annotation.model_fields) if sections_in(annotation) else []
    return f"a mapping of keys ({', '.join(names)})" if 0 < len(names) <= FEW else "a mapping of keys"
