"""YAML as people mean it, with the line of every key.

PyYAML reads YAML 1.1, where `1e-4` is text and `no` is false. Recipes are read by the core schema of
YAML 1.2 instead: `1e-4` is a number, only `true` and `false` are booleans, and a key given twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hfstrat.errors import UserError

KeyPath = tuple[str, ...]


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
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*path, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines:
            raise UserError(
                f"{source}:{line}: {'.'.join(key)}: given twice (first on line {lines[key]}); keep one of them"
            )
        lines[key] = line
        _walk(value_node, key, source, lines)


def parse(text: str, source: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Parse a recipe's text into plain values and the line of each key.

    Raises:
        UserError: text that is no YAML, no mapping, or gives a key twice; it names `source` and the line.
    """
    loader = _Core(text)
    lines: dict[KeyPath, int] = {}
    try:
        node = loader.get_single_node()
        _walk(node, (), source, lines)
        data = loader.construct_document(node) if node is not None else None  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: this is no valid YAML: {problem}; check the indentation, colons and quotes") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    if not isinstance(data, dict):
        given = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{source}: a recipe is a mapping with keys such as model, strategy, data; given {given}")
    return data, lines


def parse_value(text: str) -> Any:
    """One value from the command line, read as the recipe file would read it."""
    loader = _Core(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def read(path: str) -> str:
    """The text of a recipe file.

    Raises:
        UserError: no such file, a folder, or no UTF-8 text.
    """
    from difflib import get_close_matches

    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path()
        near = get_close_matches(file.name, [p.name for p in folder.glob("*.y*ml")], n=1, cutoff=0.5)
        hint = f"did you mean {folder / near[0]}?" if near else "`hfstrat recipes ls` shows those that come with hfstrat"
        raise UserError(f"{path}: no such recipe file; {hint}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: a recipe is YAML in UTF-8; this file is not text in UTF-8") from None
