"""From a recipe file and `a.b=c` overrides to a `Recipe` that knows where each of its values came from.

A message that begins with a key of the recipe gets the file and the line of that key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hfstrat.errors import UserError
from hfstrat.recipe import foreign, suggestions, yaml
from hfstrat.recipe.distill import StudentName
from hfstrat.recipe.schema import MODEL_DEFAULTS, UNIONS, Recipe
from hfstrat.recipe.section import Default
from hfstrat.recipe.strategies import ContinuationName
from hfstrat.recipe.yaml import KeyPath

COMMAND_LINE = "command line"
SECRET = ("hub_token", "token", "api_key")  # keys whose values are not shown


SHORT_FORMS = {
    "model": "name_or_path",
    "strategy": "name",
    "objective": "name",
    "data": "train",
}  # `strategy: lora` is {name: lora}


NESTED: dict[KeyPath, Any] = {("strategy", "student"): StudentName, ("strategy", "then"): ContinuationName}
"""Keys whose values are strategies within a strategy, and the names that they may have."""


@dataclass(frozen=True)
class Loaded:
    """A recipe, the file it came from, and the origin of each value that is not a plain default."""

    recipe: Recipe
    source: str
    origins: dict[KeyPath, str]

    def origin(self, path: KeyPath) -> str:
        """Where this value came from."""
        return self.origins.get(path, "default")

    def place(self, path: KeyPath) -> str:
        """Where to look for this value: its own place, or that of the section that it belongs in."""
        return _place(
            {key: origin for key, origin in self.origins.items() if not origin.startswith("default")}, path, self.source
        )


def load_recipe(path: str, overrides: list[str] | tuple[str, ...] = (), text: str | None = None) -> Loaded:
    """Read a recipe file, apply the overrides, fill the defaults that depend on the strategy.

    Args:
        text: of the recipe, where there is no file yet.

    Raises:
        UserError: every mistake found, one line each: where, what was given, what is expected, what to write.
    """
    data, lines = yaml.parse(yaml.read(path) if text is None else text, path)
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        apply_override(override, data, origins)
    answers = Answers(origins, path, data)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(answers.to(error.errors()))) from None
    if recipe.strategy.needs_weights and not recipe.model.name_or_path:
        raise UserError(answers.no_model(given="model" in data))
    for section, key in SHORT_FORMS.items():
        if isinstance(data.get(section), str):
            origins[section, key] = origins[section,]
    return Loaded(_with_defaults(recipe, origins), path, origins)


def load_data(source: str, overrides: Iterable[str], task: str | None = None) -> Loaded:
    """A recipe of which only the section `data` is meant: this source, and overrides that begin with `data.`.

    Args:
        task: of the data, where it is known: then all overrides are applied.

    Raises:
        UserError: every mistake in an override.
    """
    recipe = {"strategy": "full", "model": "-", "data": {"train": source}, "output_dir": "-"}
    if task is not None:
        return load_recipe("--data", list(overrides), json.dumps({"task": task, **recipe}))
    return load_recipe("--data", [each for each in overrides if each.startswith("data.")], json.dumps(recipe))


def apply_override(override: str, data: dict[str, Any], origins: dict[KeyPath, str]) -> None:
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
        if depth == 0 and isinstance(target.get(key), str) and (key,) in origins:
            origins[key, SHORT_FORMS[key]] = origins[key,]
        target[key] = inner
        target = inner
    try:
        target[path[-1]] = yaml.parse_value(text)
    except UserError as error:
        raise UserError(f"{COMMAND_LINE}: {override}: {error}") from None
    for stale in [known for known in origins if known[: len(path)] == path]:
        del origins[stale]
    origins[path] = f"{COMMAND_LINE}: {override}"


def _names(data: dict[str, Any]) -> dict[str, str]:
    """The names of the sections that are one of several, as far as they are given."""
    sections = ((key, data.get(key)) for key in UNIONS)
    found = {key: section.get("name") if isinstance(section, dict) else section for key, section in sections}
    names = {key: name for key, name in found.items() if isinstance(name, str)}
    for key, name in list(names.items()):
        variants = UNIONS[key][name].variants if name in UNIONS[key] else ""
        if variants and isinstance(data[key], dict) and isinstance(data[key].get(variants), str):
            names[f"{key}.{variants}"] = data[key][variants]
    return names


def _with_defaults(recipe: Recipe, origins: dict[KeyPath, str]) -> Recipe:
    """Fill the keys left open: by the defaults of the strategy and of the task, and a length if none is given."""
    training, update = recipe.training, dict[str, Any]()
    for key, default in recipe.strategy.training_defaults().items():
        source, given = f"default of {recipe.strategy.name}: {default.source}", getattr(training, key)
        if isinstance(default.value, dict):
            update[key] = {**default.value, **given}
            origins |= {("training", key, name): source for name in default.value if name not in given}
        elif given is None or key not in training.model_fields_set:
            update[key] = default.value
            origins["training", key] = source
    rate = recipe.objective.rate
    if rate is not None and "learning_rate" in update:
        update["learning_rate"] *= rate.value
        origins["training", "learning_rate"] = f"default of {recipe.strategy.name} for {recipe.objective.name}: {rate.source}"
    if training.num_train_epochs is None and training.max_steps is None and training.max_time is None:
        update["num_train_epochs"] = 3.0
        origins["training", "num_train_epochs"] = "default: no length was given"
    measured = _open_defaults(recipe)
    origins |= {("evaluation", key): f"default of {recipe.objective.name}: {one.source}" for key, one in measured.items()}
    evaluation = recipe.evaluation.model_copy(update={key: one.value for key, one in measured.items()})
    fields, defaults = type(recipe.model).model_fields, MODEL_DEFAULTS.get(recipe.task, {})
    for_task = {key: one for key, one in defaults.items() if getattr(recipe.model, key) == fields[key].default}
    origins |= {("model", key): f"default of {recipe.task}: {one.source}" for key, one in for_task.items()}
    model = recipe.model.model_copy(update={key: one.value for key, one in for_task.items()})
    trained = training.model_copy(update=update)
    return recipe.model_copy(update={"model": model, "training": trained, "evaluation": evaluation})


def _open_defaults(recipe: Recipe) -> dict[str, Default]:
    """The objective's defaults for the keys of `evaluation` that are not given."""
    closed = set(recipe.evaluation.model_fields_set)
    closed |= {"metric_rows"} if "metrics" in closed else set()  # it belongs to the default metrics
    closed |= {"max_rows"} if recipe.data.eval_size >= 1 else set()  # all rows that are held out are measured
    return {key: default for key, default in recipe.objective.evaluation.items() if key not in closed}


@dataclass(frozen=True)
class Answers:
    """Turns pydantic's errors into sentences: where, what was given, what is expected, what to write."""

    origins: dict[KeyPath, str]
    source: str
    given: dict[str, Any]

    @property
    def names(self) -> dict[str, str]:
        return _names(self.given)

    def to(self, errors: list[ErrorDetails]) -> list[str]:
        """One sentence for each place, then the keys of each section with an unknown one; a union reports each member."""
        groups: dict[tuple[KeyPath, bool], list[ErrorDetails]] = {}
        for error in errors:
            is_unknown = error["type"] in ("extra_forbidden", "invalid_key")
            groups.setdefault((_path(error["loc"]), is_unknown), []).append(error)
        sentences = [
            self._unknown(path, group[0]) if unknown else self._known(path, group) for (path, unknown), group in groups.items()
        ]
        sections = dict(suggestions.place_and_keys(path, self.names) for path, unknown in groups if unknown)
        keys = [f"keys of {place}: {', '.join(names)}" for place, names in sections.items() if names]
        return sentences + keys + self._of_another_tool()

    def _of_another_tool(self) -> list[str]:
        """What to do with a config of another tool, if this is one."""
        tool = "" if {"strategy", "data"} & self.given.keys() else foreign.tool_of(self.given)
        return (
            [f"{self.source}: this looks like a config of {tool}: `hfstrat migrate {self.source}` converts it"] if tool else []
        )

    def _where(self, path: KeyPath) -> str:
        return _place(self.origins, path, self.source)

    def _unknown(self, path: KeyPath, error: ErrorDetails) -> str:
        value = error["input"]
        answer = suggestions.unknown_key(path, value, self.names, self.given)
        shown = "***" if path[-1] in SECRET else _show(value)
        return f"{self._where(path)}: {'.'.join(path)} = {shown}: {answer}"

    def _known(self, path: KeyPath, errors: list[ErrorDetails]) -> str:
        kind, value = errors[0]["type"], errors[0]["input"]
        if len(path) == 1 and path[0] in UNIONS and kind != "missing":
            named = value.get("name") if isinstance(value, dict) else value
            if named is None or kind.startswith("union_tag"):
                return self._no_such_name(path[0], named, in_section=isinstance(value, dict))
        if path in NESTED and (kind == "missing" or kind.startswith("union_tag")):
            return self._no_nested_strategy(path, None if kind == "missing" else value)
        if kind == "value_error":
            return self._refused(path, errors[0])
        wanted = suggestions.wanted(_without_index(path), self.names)
        dotted, field = ".".join(path), suggestions.field_of(_without_index(path), self.names)
        if kind == "missing":
            about = f" ({field.description})" if field and field.description else ""
            return f"{self._where(path)}: {dotted}: missing; expected {wanted}{about}"
        kinds = {error["type"] for error in errors}
        if "finite_number" in kinds:
            wanted = wanted.replace("a number", "a finite number", 1)
        hint = suggestions.instead(_without_index(path), value, kinds, field)
        return f"{self._where(path)}: {dotted} = {_show(value)}: expected {wanted}{f'; {hint}' if hint else ''}"

    def no_model(self, given: bool) -> str:
        """The answer to a strategy without the weights that it starts from."""
        if not given:
            return f"{self.source}: model: missing; expected {suggestions.IN_SHORT['model']}"
        return (
            f"{self._where(('model', 'name_or_path'))}: model.name_or_path: missing; expected text that is not empty "
            "(Hub id, local folder, or a .gguf file)"
        )

    def _no_such_name(self, key: str, name: Any, in_section: bool) -> str:
        """The answer to a strategy or an objective that does not exist."""
        names = ", ".join(UNIONS[key])
        where = self._where((key, "name"))
        if name is None:
            return f"{where}: {key}{'.name' if in_section else ''}: missing; expected one of {names}"
        near = suggestions.nearest(str(name), list(UNIONS[key]))
        known = foreign.VALUES.get(f"{key}.name", {}).get(str(name).lower())
        hint = known or (f"did you mean '{near}'?" if near else "")
        hint = f"; {hint}" if hint else ""
        return f"{where}: {key}.name = {_show(name)}: no such {key} in this version; expected one of {names}{hint}"

    def _no_nested_strategy(self, path: KeyPath, value: Any) -> str:
        names = [str(name) for name in get_args(NESTED[path])]
        name = value.get("name") if isinstance(value, dict) else value
        near = suggestions.nearest(str(name), names) if name is not None else None
        given = "missing" if name is None else f"{_show(name)} is not a strategy for {'.'.join(path)}"
        hint = f"; did you mean '{near}'?" if near else ""
        where = self._where((*path, "name"))
        return f"{where}: {'.'.join(path)}.name: {given}; expected one of {', '.join(names)}{hint}"

    def _refused(self, path: KeyPath, error: ErrorDetails) -> str:
        """The message of a validator; that of a whole section is placed at the first given key that it names."""
        text = error["msg"].removeprefix("Value error, ")
        if not isinstance(error["input"], dict):
            return f"{self._where(path)}: {'.'.join(path)} = {_show(error['input'])}: {text}"
        words = [word.split(".") for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", text)]
        named = ((*path, *word[:depth]) for word in words for depth in range(len(word), 0, -1))
        at = next((key for key in named if key in self.origins), path)
        if re.match(r"[a-z_]+(\.[a-z_]+)*: ", text):  # it begins with the key that is wrong, within this section
            own = path[:-1] if path and text.startswith(f"{path[-1]}: ") else path
            return f"{self._where(at)}: {'.'.join((*own, text))}"
        return f"{self._where(at)}: {'.'.join(at) or 'recipe'}: {text}"


def _place(origins: dict[KeyPath, str], path: KeyPath, source: str) -> str:
    """The place of a key or of the nearest section around it; of a section that the command line made, that of a key in it."""
    around = (origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins)
    within = (origin for known, origin in origins.items() if path and known[: len(path)] == path)
    exact = origins.get(path)
    return exact or next(within, None) or next(around, None) or source


def _path(loc: tuple[int | str, ...]) -> KeyPath:
    """Pydantic's location without the union tags that it puts in."""
    parts = list(loc)
    for union in (*((key,) for key in UNIONS), *NESTED):
        place, names = len(union), UNIONS[union[0]]
        if tuple(parts[:place]) == union and len(parts) > place and parts[place] in names:
            del parts[place]
    known = []
    for part in parts:
        if isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool", "constrained-str")):
            break
        known.append(str(part))
    return tuple(known)


def _without_index(path: KeyPath) -> KeyPath:
    return tuple(part for part in path if not part.isdigit())


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def key_of(message: str) -> tuple[str, ...] | None:
    """The recipe key that a message begins with, if it does: `data.csv` is a file, not a key."""
    match = re.match(r"(\w+(?:\.\w+)*): ", message)
    path = tuple(match.group(1).split(".")) if match else ()
    return path if path and suggestions.field_of(path[:2], {}) else None


@contextmanager
def about(key: str) -> Iterator[None]:
    """A message that names no key of the recipe is about this one."""
    try:
        yield
    except UserError as error:
        if key_of(str(error)):
            raise
        raise UserError(f"{key}: {error}") from error.__cause__


@contextmanager
def located(loaded: Loaded) -> Iterator[None]:
    """A UserError from inside gets the file and line of the recipe key that it begins with."""
    try:
        yield
    except UserError as error:
        path = key_of(str(error))
        raise UserError(f"{loaded.place(path) if path else loaded.source}: {error}") from error.__cause__
