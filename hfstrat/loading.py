"""From a recipe file and `a.b=c` overrides to a `Recipe` that knows where each of its values came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hfstrat import advice, recipe_file
from hfstrat.config import Recipe
from hfstrat.errors import UserError
from hfstrat.recipe_file import KeyPath
from hfstrat.strategies import STRATEGIES

COMMAND_LINE = "command line"
SHORT_FORMS = {"model": "name_or_path", "strategy": "name", "data": "train"}  # `strategy: lora` is {name: lora}


@dataclass(frozen=True)
class Loaded:
    """A recipe, the file it came from, and the origin of each value that is not a plain default."""

    recipe: Recipe
    source: str
    origins: dict[KeyPath, str]

    def origin(self, path: KeyPath) -> str:
        """Where this very value came from."""
        return self.origins.get(path, "default")

    def place(self, path: KeyPath) -> str:
        """Where to look for this value: its own place, or that of the section it would stand in."""
        found = (self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins)
        return next((place for place in found if not place.startswith("default")), self.source)


def load_recipe(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Loaded:
    """Read a recipe file, apply the overrides, fill the defaults that depend on the strategy.

    Raises:
        UserError: every mistake found, one line each: where, what was given, what is expected, what to write.
    """
    data, lines = recipe_file.parse(recipe_file.read(path), path)
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply(override, data, origins)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        strategy = _strategy_name(data)
        messages = _messages(error.errors(), origins, path, strategy)
        raise UserError("\n".join(messages)) from None
    for section, key in SHORT_FORMS.items():
        if isinstance(data.get(section), str):
            origins[section, key] = origins[section,]
    return Loaded(_with_defaults(recipe, origins), path, origins)


def _apply(override: str, data: dict[str, Any], origins: dict[KeyPath, str]) -> None:
    dotted, sign, text = override.partition("=")
    path = tuple(dotted.strip().split("."))
    if not sign or not all(path):
        raise UserError(f"{COMMAND_LINE}: {override!r}: an override is written key=value, such as training.learning_rate=1e-4")
    target = data
    for depth, key in enumerate(path[:-1]):
        inner = target.get(key)
        if isinstance(inner, str) and depth == 0:  # the short form, such as `model: some/id`
            inner = {SHORT_FORMS[key]: inner} if key in SHORT_FORMS else inner
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"{COMMAND_LINE}: {override!r}: '{'.'.join(path[: depth + 1])}' is no section")
        if depth == 0 and target.get(key) != inner and (key,) in origins:
            origins[key, SHORT_FORMS[key]] = origins[key,]
        target[key] = inner
        target = inner
    target[path[-1]] = recipe_file.parse_value(text)
    for stale in [known for known in origins if known[: len(path)] == path]:
        del origins[stale]
    origins[path] = f"{COMMAND_LINE}: {override}"


def _strategy_name(data: dict[str, Any]) -> str | None:
    section = data.get("strategy")
    name = section.get("name") if isinstance(section, dict) else section
    return name if isinstance(name, str) else None


def _with_defaults(recipe: Recipe, origins: dict[KeyPath, str]) -> Recipe:
    """Fill the training keys left open: by the strategy's own defaults, and a length if none is given."""
    training, update = recipe.training, {}
    for key, default in recipe.strategy.defaults.items():
        if getattr(training, key) is None:
            update[key] = default.value
            origins["training", key] = f"default of {recipe.strategy.name}: {default.source}"
    if training.num_train_epochs is None and training.max_steps is None and training.max_time is None:
        update["num_train_epochs"] = 3.0
        origins["training", "num_train_epochs"] = "default: no length was given"
    return recipe.model_copy(update={"training": training.model_copy(update=update)}) if update else recipe


def _messages(errors: list[ErrorDetails], origins: dict[KeyPath, str], source: str, strategy: str | None) -> list[str]:
    messages: dict[KeyPath, str] = {}
    for error in errors:
        path = _path(error["loc"])
        key = path if error["type"] != "extra_forbidden" else (*path, "")
        messages.setdefault(key, _message(error, path, origins, source, strategy))
    return list(messages.values())


def _path(loc: tuple[int | str, ...]) -> KeyPath:
    """Pydantic's location without the union tags that it puts in."""
    parts = list(loc)
    if parts[:1] == ["strategy"] and len(parts) > 1 and parts[1] in STRATEGIES:
        del parts[1]
    known = []
    for part in parts:
        if isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool")):
            break
        known.append(str(part))
    return tuple(known)


def _message(
    error: ErrorDetails, path: KeyPath, origins: dict[KeyPath, str], source: str, strategy: str | None
) -> str:
    dotted = ".".join(path)
    where = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), source)
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"{where}: {dotted} = {_show(error['input'])}: {advice.unknown_key(path, strategy)}"
    if kind == "missing":
        return f"{where}: {dotted}: missing; {_meaning(path, strategy)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names = ", ".join(STRATEGIES)
        given = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        if given is None:
            return f"{where}: strategy.name: missing; expected one of {names}"
        near = advice.get_close_matches(str(given), list(STRATEGIES), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{where}: strategy.name = {_show(given)}: no such strategy in this version; expected one of {names}{hint}"
    if kind == "value_error":
        return f"{where}: {dotted or 'recipe'}{_given(error['input'])}: {error['msg'].removeprefix('Value error, ')}"
    field = advice.field_of(_without_index(path), strategy)
    wanted = advice.expected(field) if field else "a mapping of keys"
    return f"{where}: {dotted}{_given(error['input'])}: expected {wanted}{_quoted_number(error['input'], kind)}"


def _without_index(path: KeyPath) -> KeyPath:
    return tuple(part for part in path if not part.isdigit())


def _meaning(path: KeyPath, strategy: str | None) -> str:
    field = advice.field_of(path, strategy)
    described = f" ({field.description})" if field and field.description else ""
    return f"expected {advice.expected(field)}{described}" if field else "it is required"


def _given(value: Any) -> str:
    return "" if isinstance(value, dict | list) and value else f" = {_show(value)}"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _quoted_number(value: Any, kind: str) -> str:
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        if isinstance(recipe_file.parse_value(value), int | float):
            return "; it is quoted: remove the quotes"
    return ""
