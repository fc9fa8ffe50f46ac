"""Reference pages of the documentation, from the schema, the commands and the tables of `hfstrat migrate`.

`python scripts/docs_reference.py FOLDER` writes them; the site (`make docs`) has them without files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hfstrat.cli.main import command
from hfstrat.recipe import library, suggestions
from hfstrat.recipe import yaml as recipe_yaml
from hfstrat.recipe.migration.convert import TOOLS
from hfstrat.recipe.migration.rules import Gone, Rule
from hfstrat.recipe.schema import UNIONS, Recipe

INTRODUCTION = {
    "keys": "Every key of a recipe, from the schema of this version (`hfstrat schema` prints it as JSON). Keys are "
    "written with their sections: `strategy.r` is `r` in `strategy:`.",
    "commands": "Every command and option, from the command line of this version.",
}
EXAMPLES = {  # of keys whose examples cannot be found in a bundled recipe, a type or a description
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "strategy": "lora",
    "data": "rows.jsonl",
    "model.revision": "main",
    "model.tokenizer": "some/tokenizer",
    "model.add_tokens": ["<tool>"],
    "model.quantization.skip_modules": ["lm_head"],
    "data.columns": {"response": "completion"},
    "data.chat_template_kwargs": {"enable_thinking": False},
    "data.config": "en",
    "data.eval_split": "test",
    "data.revision": "main",
    "data.train": "rows.jsonl",
    "data.eval": "eval.jsonl",
    "strategy.patterns": ["*.mlp.*"],
    "strategy.adapter": "runs/first/final",
    "strategy.target_modules": ["q_proj", "v_proj"],
    "strategy.target_parameters": ["mlp.experts.gate_up_proj"],
    "strategy.modules_to_save": ["lm_head"],
    "strategy.gradual_unfreezing": {"every": 0.1},
    "strategy.gradual_unfreezing.every": 0.1,
    "strategy.hidden_states.layers": [[4, 2]],
    "objective.rewards.kwargs": {"limit": 200},
    "training.class_weights": "balanced",
    "training.extra": {"adam_beta2": 0.95},
    "evaluation.regex": "#### (-?[0-9]+)",
    "evaluation.prompts": ["Say hello."],
    "evaluation.choices": ["arc.jsonl"],
    "evaluation.lm_eval": ["arc_easy"],
    "evaluation.include_path": "my_tasks",
    "hub": {"push_to_hub": True, "repo_id": "me/my-model"},
    "hub.repo_id": "me/my-model",
    "hub.revision": "main",
    "output_dir": "runs/mine",
}


class Key(NamedTuple):
    """A key of a recipe: its dotted path, and the section that it is a field of."""

    path: str
    section: type[BaseModel]
    field: FieldInfo


def sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Heading, path and class of each section, in the order of the schema."""
    yield "The recipe", "", Recipe
    for name in Recipe.model_fields:
        for path, classes in suggestions.sections_of(Recipe).items():
            if path[:1] != (name,):
                continue
            for cls in classes:
                yield _heading(path, cls), ".".join(path), cls


def _heading(path: tuple[str, ...], cls: type[BaseModel]) -> str:
    named = get_args(cls.model_fields["name"].annotation) if "name" in cls.model_fields else ()
    suffix = f": {named[0]}" if len(named) == 1 and path[0] in UNIONS else ""
    return f"`{'.'.join(path)}`{suffix}"


def every_key() -> Iterator[Key]:
    """Every key, once per section class."""
    for _, path, cls in sections():
        for name, field in cls.model_fields.items():
            yield Key(f"{path}.{name}" if path else name, cls, field)


def keys_page() -> str:
    """The page with every key of a recipe."""
    lines, seen = ["# Keys of a recipe", "", INTRODUCTION["keys"]], set[tuple[str, str]]()
    for heading, path, cls in sections():
        if (heading, cls.__name__) in seen:
            continue
        seen.add((heading, cls.__name__))
        about = (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        lines += ["", f"## {heading}", "", re.sub(r"\s+", " ", about), ""]
        lines += ["| key | value | default | meaning | example |", "|---|---|---|---|---|"]
        for name, field in cls.model_fields.items():
            key = Key(f"{path}.{name}" if path else name, cls, field)
            cells = (f"`{name}`", value_of(key), default_of(key), meaning_of(key), example_text(key))
            lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    parts = re.split(r"(`[^`]*`)", text)  # code is escaped by Markdown itself
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts) or "–"


def value_of(key: Key) -> str:
    """The values that a key takes, in words; each mapping once."""
    if "." not in key.path and key.path in suggestions.IN_SHORT:
        return suggestions.IN_SHORT[key.path]
    text = re.sub(r"a mapping of keys \([^)]*\)", "a mapping", suggestions.expected(key.field)).replace(
        "a mapping of keys", "a mapping"
    )
    return " or ".join(dict.fromkeys(text.split(" or ")))


def meaning_of(key: Key) -> str:
    """The description of a key; of a section the first line of its class."""
    if key.field.description:
        return key.field.description
    if key.path in ("model", "strategy", "data", "training", "evaluation", "hub"):
        return f"A section: see `{key.path}` below"
    inner = next(iter(suggestions.sections_in(key.field.annotation)), None)
    if inner is not None:
        return (inner.__doc__ or "").split("\n")[0]
    return "The name of this kind" if key.path.endswith("name") else ""


def default_of(key: Key) -> str:
    field = key.field
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else None
    if isinstance(value, BaseModel):
        return f"`{value.name}`" if hasattr(value, "name") else "its defaults"
    return "none" if value is None else f"`{_flow(value)}`"


def example_text(key: Key) -> str:
    return f"`{key.path.rpartition('.')[2]}: {_flow(example_of(key))}`"


def example_of(key: Key) -> Any:
    """A value of the key: from the field, the table above, a bundled recipe, its description or its type."""
    if key.field.examples:
        return key.field.examples[0]
    path = re.sub(r"^strategy\.teacher\.", "model.", re.sub(r"^strategy\.(student|then)\.", "strategy.", key.path))
    if path in EXAMPLES:
        return EXAMPLES[path]
    if (found := _of_recipes().get((key.path, key.section.__name__), PydanticUndefined)) is not PydanticUndefined:
        return found
    return _of_type(key.field)


def _of_type(field: FieldInfo) -> Any:
    options = [option for option in (field.annotation, *get_args(field.annotation)) if option is not type(None)]
    lists = [option for option in options if get_origin(option) is list]
    if lists and not suggestions.sections_in(lists[0]):
        return suggestions.choices_of(get_args(lists[0])[0])[:1] or (["text"] if get_args(lists[0])[0] is str else [])
    if any(get_origin(option) is dict or option is dict for option in options):
        return {}
    if choices := [choice for choice in suggestions.choices_of(field.annotation) if choice != str(field.default)]:
        return choices[0]
    for kind, value in ((bool, field.default is not True), (int, _number(field)), (float, _number(field)), (str, "text")):
        if kind in options:
            return value
    inner = next(iter(suggestions.sections_in(field.annotation)), None)
    if inner is not None:
        required = {name: _of_type(one) for name, one in inner.model_fields.items() if one.is_required()}
        return required or {name: _of_type(one) for name, one in list(inner.model_fields.items())[:1]}
    return field.default


def _number(field: FieldInfo) -> Any:
    """The default, or the least number that the field takes."""
    if isinstance(field.default, int | float) and not isinstance(field.default, bool):
        return field.default
    low = next((item.ge for item in field.metadata if hasattr(item, "ge")), None)
    high = next((item.le for item in field.metadata if hasattr(item, "le")), None)
    return max(1, low or 1) if high is None or high >= 1 else high


RECIPES: dict[tuple[str, str], Any] = {}


def _of_recipes() -> dict[tuple[str, str], Any]:
    """Values of the bundled recipes by key and section class."""
    if not RECIPES:
        for name in library.names("recipes"):
            given = recipe_yaml.parse(library.find("recipes", name).read_text(encoding="utf-8"), name)[0]
            _collect("", Recipe, given)
    return RECIPES


def _collect(path: str, cls: type[BaseModel], given: dict[str, Any]) -> None:
    for name, value in given.items():
        field = cls.model_fields.get(name)
        if field is None:
            continue
        dotted = f"{path}.{name}" if path else name
        RECIPES.setdefault((dotted, cls.__name__), value)
        if isinstance(value, dict):
            union = UNIONS.get(name, {}).get(value.get("name", "")) if not path else None
            inner = union or next(
                (one for one in suggestions.sections_in(field.annotation) if set(value) <= set(one.model_fields)), None
            )
            if inner is not None:
                _collect(dotted, inner, value)


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, float) and value and (value >= 1e6 or value < 1e-3):
        return f"{value:g}".replace("e-0", "e-")
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True).strip()
    return text.removesuffix("\n...").strip()


# commands

KINDS = {"int": "N", "float": "X", "Path": "PATH"}  # of a default: the name of its values


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its full name."""
    yield from _commands("hfstrat", command())


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield name, command
    for each in inner.values():
        yield from _commands(f"{name} {each.name}", each)


def commands_page() -> str:
    """The page with every command."""
    lines = ["# Commands", "", INTRODUCTION["commands"]]
    for name, described in commands():
        arguments = [one for one in described.params if one.param_type_name == "argument"]
        usage = " ".join([name, *(_argument(one) for one in arguments), "[OPTION]..."])
        lines += ["", f"## {name}", "", (described.help or "").strip(), "", "```text", usage, "```", ""]
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for one in described.params:
            if one.name != "help":
                lines.append(f"| {_names(one)} | {_default(one)} | {_cell(one.help or '')} |")
    return "\n".join(lines) + "\n"


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_cell(_argument(parameter))}`"
    flag = getattr(parameter, "is_flag", False)
    kind = KINDS.get(type(parameter.default).__name__.removeprefix("Posix").removeprefix("Windows"), "TEXT")
    value = "" if flag else f" {parameter.metavar or kind}"
    return ", ".join(f"`{name}{_cell(value) if value else ''}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    value = parameter.default() if callable(parameter.default) else parameter.default
    if parameter.required:
        return "required"
    return "–" if value in (None, False, "", ()) or "Sentinel" in type(value).__name__ else f"`{value}`"


# other tools


def tool_page(name: str) -> str:
    """The table of keys of another tool."""
    tool = TOOLS[name]
    lines = [
        f"# Keys of {tool.title}",
        "",
        f"What `hfstrat migrate` makes of each key of {tool.title} {tool.release}, and of some that older releases had, from "
        "its own table. In the middle are keys of a recipe; a key without one has no counterpart, or none is needed.",
        "",
        f"| {tool.title} | recipe | |",
        "|---|---|---|",
    ]
    for key, rule in sorted(tool.rules.items()):
        targets = ", ".join(f"`{target}`" for target in rule.targets) or "–"
        lines.append(f"| `{key}` | {targets} | {_cell(_remark(rule))} |")
    return "\n".join(lines) + "\n"


def _remark(rule: Rule) -> str:
    if rule.targets:
        return rule.why or "the same value"
    outcome = rule.convert("-") if rule.convert else None
    return rule.why if isinstance(outcome, Gone) else f"not needed: {rule.why}"


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {"keys.md": keys_page(), "commands.md": commands_page()} | {f"{name}.md": tool_page(name) for name in TOOLS}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    print(json.dumps(sorted(pages())))


if __name__ == "__main__":
    main()
