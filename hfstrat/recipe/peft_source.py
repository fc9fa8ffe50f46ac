"""The types of the installed PEFT and the fields of their configuration classes, read from its source text.

Importing PEFT takes seconds and imports torch, which a recipe must not. This is the only place that depends on how PEFT's files
are written; `tests/recipe/test_peft_source.py` compares it with the imported library and names the version if they differ.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
import typing
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ConfigDict, Field, create_model

from hfstrat.recipe.section import Section

TESTED = ("0.21.2",)  # the versions of PEFT whose files are known to be read correctly
OURS = frozenset(  # fields that PEFT or hfstrat fills from the recipe and the model
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    }
)


class PeftField(NamedTuple):
    """A field of a configuration class: its type, its default (`...` where it is no literal), and PEFT's description."""

    annotation: Any
    default: Any
    help: str


def peft_version() -> str:
    """The version of the installed PEFT; empty without it."""
    try:
        return version("peft")
    except PackageNotFoundError:
        return ""


@lru_cache
def types() -> tuple[str, ...]:
    """The names of PEFT's types, such as IA3; empty if they cannot be read."""
    for node in _tree("utils/peft_types.py").body:
        if isinstance(node, ast.ClassDef) and node.name == "PeftType":
            return tuple(part.targets[0].id for part in node.body if isinstance(part, ast.Assign))  # type: ignore[attr-defined]
    return ()


@lru_cache
def fields(peft_type: str) -> dict[str, PeftField]:
    """The fields that a recipe can set for this type, by name; empty if they cannot be read."""
    file = f"tuners/{peft_type.lower()}/config.py"
    wanted = f"PeftType.{peft_type}"
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and any(
            isinstance(part, ast.Assign)
            and ast.unparse(part.targets[0]) == "self.peft_type"
            and ast.unparse(part.value) == wanted
            for part in ast.walk(node)
        ):
            found = _fields_of(file, node.name)
            return {name: one for name, one in found.items() if name not in OURS and not name.startswith("_")}
    return {}


@lru_cache
def section_of(peft_type: str) -> type[Section]:
    """A section with the fields of this type, which validates their names and types as PEFT declares them."""
    known: dict[str, Any] = {
        name: (one.annotation, Field(None if one.default is ... else one.default, description=" ".join(one.help.split())))
        for name, one in fields(peft_type).items()
    }
    config = ConfigDict(**{**Section.model_config, "validate_default": False, "protected_namespaces": ()})
    return create_model(f"Peft{peft_type}", __base__=type("PeftFields", (Section,), {"model_config": config}), **known)


def quantizes(peft_type: str) -> bool:
    """Whether adapters of this type have a form for layers that bitsandbytes quantized."""
    folder = _folder()
    return folder is not None and (folder / "tuners" / peft_type.lower() / "bnb.py").is_file()


@lru_cache
def _folder() -> Path | None:
    spec = importlib.util.find_spec("peft")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@lru_cache
def _tree(file: str) -> ast.Module:
    """The syntax tree of a file of PEFT; an empty one if it does not exist."""
    folder = _folder()
    exists = folder is not None and (folder / file).is_file()
    return ast.parse((folder / file).read_text(encoding="utf-8") if folder and exists else "")


def _fields_of(file: str, name: str) -> dict[str, PeftField]:
    """The fields of a configuration class with those that it inherits."""
    tree = _tree(file)
    node = next((one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name), None)
    if node is None:
        return {}
    found: dict[str, PeftField] = {}
    for base in node.bases:
        parent = ast.unparse(base)
        here = any(isinstance(one, ast.ClassDef) and one.name == parent for one in tree.body)
        for place in [file] if here else _places(file, parent):
            if inherited := _fields_of(place, parent):
                found |= inherited
                break
    names = _Names(file)
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            if (one := _field(part, names)) is not None:
                found[part.target.id] = one
            else:
                found.pop(part.target.id, None)
    return found


def _places(file: str, name: str) -> list[str]:
    """The files in which a name that this file imports may be defined."""
    for node in _tree(file).body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            package = file.split("/")[: -node.level] if node.level else []
            parts = (node.module or "").split(".")
            path = "/".join([*package, *parts] if node.level else parts[1:])
            return [f"{path}.py", f"{path}/config.py"]
    return []


def _field(part: ast.AnnAssign, names: _Names) -> PeftField | None:
    """A field from its declaration; None for one that the class does not take as an argument."""
    default: Any = ...
    text = ""
    if isinstance(part.value, ast.Call):
        given = {one.arg: one.value for one in part.value.keywords}
        if "init" in given and ast.unparse(given["init"]) == "False":
            return None
        if "default" in given:
            default = names.value(given["default"])
        elif ast.unparse(given.get("default_factory", ast.Constant(None))) in ("list", "dict"):
            default = [] if ast.unparse(given["default_factory"]) == "list" else {}
        if isinstance(given.get("metadata"), ast.Dict):
            text = str(names.value(given["metadata"]).get("help", "")) if names.value(given["metadata"]) is not ... else ""
    elif part.value is not None:
        default = names.value(part.value)
    annotation = names.type(part.annotation)
    return PeftField(annotation | None if default is None else annotation, default, text)


class _Names(dict[str, Any]):
    """What the names in a file's annotations stand for: its enumerations are literals, unknown names are anything."""

    def __init__(self, file: str) -> None:
        super().__init__({name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")})
        self |= {"list": list, "dict": dict, "str": str, "int": int, "float": float, "bool": bool, "List": list, "Dict": dict}
        self |= {"set": list, "tuple": list, "Tuple": list, "Sequence": list}
        self.members: dict[str, Any] = {}
        for node in _tree(file).body:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                values = {
                    part.targets[0].id: part.value.value  # type: ignore[attr-defined]
                    for part in node.body
                    if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant)
                }
                self.members |= {f"{node.name}.{key}": value for key, value in values.items()}
                self[node.name] = Literal[tuple(values.values())]

    def __missing__(self, name: str) -> Any:
        return Any

    def value(self, node: ast.expr) -> Any:
        """A literal or a member of an enumeration; `...` for anything else."""
        if (name := ast.unparse(node)) in self.members:
            return self.members[name]
        try:
            return ast.literal_eval(node)
        except ValueError:
            return ...

    def type(self, node: ast.expr) -> Any:
        """The type that an annotation names, `Any` where it cannot be read."""
        try:
            found = eval(ast.unparse(node), {"__builtins__": {}}, self)  # the text of an installed library, names only
        except Exception:  # a type of torch, or a new form of annotation
            return Any
        parts = get_args(found)
        enumerated = [one for one in self.values() if get_origin(one) is Literal]
        if str in parts and any(one in enumerated for one in parts):  # Union[AnEnum, str] takes the members only
            return functools.reduce(operator.or_, (one for one in parts if one is not str))
        return found
