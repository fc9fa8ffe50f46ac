"""Recipes as YAML 1.2, with the line of every key.

PyYAML reads YAML 1.1, where `1e-4` is text and `no` is false. Recipes are read with the core schema of YAML 1.2 instead:
`1e-4` is a number, only `true` and `false` are booleans, and a duplicate key is an error.

ruamel.yaml reads YAML 1.2 and knows lines too, but replaces none of this: it takes `0x10`, `1_000` and `2024-01-01` for
numbers and dates, passes unknown tags and an alias to itself without an error, and names the second of two duplicate keys
only. Its resolvers and the walk over the keys would be written here all the same, and it takes longer to import.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hfstrat.errors import UserError
from hfstrat.recipe import library

KeyPath = tuple[str, ...]
DEEPEST = 20  # levels; a recipe has four at most
KINDS = {
    "str": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "NoneType": "nothing",
}
HINTS = {  # a phrase in PyYAML's message: the usual cause; "{line}" is where the construct began
    "character '\\t'": "there is a tab: indent with spaces",
    "flow sequence": "the bracket [ opened on line {line} is not closed",
    "flow mapping": "the bracket {{ opened on line {line} is not closed",
    "quoted scalar": "the quote opened on line {line} is not closed",
    "another document": "a recipe is one document: remove everything after the line ---",
    "mapping values are not allowed": "there is a second colon on this line: put the text in quotes, or check the indentation",
    "undefined alias": "put a text that begins with * in quotes",
    "constructor for the tag": "put a text that begins with ! in quotes",
    "special characters": "remove the control character",
}


class _Core(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


_Core.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Core.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Core.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Core.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Core.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Core.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _walk(node: yaml.Node | None, path: KeyPath, source: str, lines: dict[KeyPath, int]) -> None:
    """Record the line of each key. Raises UserError for duplicates, for keys that are no text, and for endless nesting."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            place = f" in {'.'.join(path)}" if path else ""
            raise UserError(f"{source}:{line}: there is a list or mapping in place of a key{place}; expected key: value")
        if value_node is node or len(path) > DEEPEST:
            raise UserError(f"{source}:{line}: {key_node.value}: it is nested too deeply, or an alias to itself; remove it")
        key = (*path, str(key_node.value))
        if key in lines:
            raise UserError(f"{source}:{line}: {'.'.join(key)}: given twice (first on line {lines[key]}); remove one of them")
        lines[key] = line
        _walk(value_node, key, source, lines)


def parse(text: str, source: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Parse a recipe's text into plain values and the line of each key.

    Raises:
        UserError: the text is not valid YAML or not a mapping, or has a duplicate key; it names `source` and the line.
    """
    lines: dict[KeyPath, int] = {}
    try:
        data = _construct(text, source, lines)
    except yaml.YAMLError as error:
        line, problem = _problem(error, text)
        raise UserError(f"{source}:{line}: this is not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        given = KINDS.get(type(data).__name__, "something else")
        raise UserError(f"{source}: a recipe is a mapping with keys such as model, strategy, data; this file holds {given}")
    return data, lines


def _construct(text: str, source: str, lines: dict[KeyPath, int]) -> Any:
    loader = _Core(text)
    try:
        node = loader.get_single_node()
        _walk(node, (), source, lines)
        return loader.construct_document(node) if node is not None else None  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line of PyYAML's error, and its message with the usual cause."""
    if isinstance(error, yaml.reader.ReaderError):
        line, begun, problem = text.count("\n", 0, error.position) + 1, 0, str(error.reason)
        context = ""
    else:
        mark, start = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
        line, begun = (mark.line + 1 if mark else 1), (start.line + 1 if start else 1)
        problem, context = str(getattr(error, "problem", None) or error), str(getattr(error, "context", None))
    hints = (hint for word, hint in HINTS.items() if word in f"{context} {problem}")
    return line, f"{problem}; {next(hints, 'check the indentation, colons and quotes').format(line=begun)}"


def parse_value(text: str) -> Any:
    """A value from the command line, read as in a recipe file.

    Raises:
        UserError: a list, mapping or quoted text is not closed, or a key is given twice.
    """
    try:
        return _construct(text, "value", {})
    except yaml.YAMLError as error:
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise UserError(f"this is not valid YAML: {_problem(error, text)[1]}") from None
        return text  # such as a pattern that begins with *


def read(path: str) -> str:
    """The text of a recipe file.

    Raises:
        UserError: there is no such file, it is a folder, or it is not UTF-8.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{path}: this is a folder; expected a recipe file{_near(file / file.name)}")
    if not file.is_file():
        bundled = "`hfstrat recipes ls` lists the bundled recipes"
        if file.with_suffix("").name in library.names("recipes"):
            bundled = f"`hfstrat recipes cp {file.with_suffix('').name}` copies the bundled recipe of that name here"
        raise UserError(f"{path}: no such recipe file; {_near(file).removeprefix(', ') or bundled}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not valid UTF-8; save the recipe as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read this recipe: {error.strerror}") from None


def _near(file: Path) -> str:
    folder = file.parent if file.parent.is_dir() else Path()
    near = get_close_matches(file.name, [p.name for p in folder.glob("*.y*ml")], n=1, cutoff=0.5)
    return f", did you mean {folder / near[0]}?" if near else ""
