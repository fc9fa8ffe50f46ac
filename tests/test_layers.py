"""A package imports only from packages below it, and no files import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import hfstrat

ROOT = Path(hfstrat.__file__).parent
FLOORS = (
    ("errors",),
    ("recipe",),
    ("data", "models", "pages"),
    ("tasks", "trainer"),
    ("objectives",),
    ("strategies", "evaluation", "publish"),
    ("run",),
    ("engine",),
    ("advisor", "comparison", "tuning", "clusters"),
    ("cli",),
    ("api",),
    ("__main__", "train"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `hfstrat`; "" is `hfstrat/__init__.py`."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for path, name in names.items()}


def imports() -> dict[str, set[str]]:
    """The modules that each module imports, inside functions and under TYPE_CHECKING too."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wanted = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                wanted = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                wanted = [each.name for each in node.names]
            for dotted in wanted:
                if dotted.partition(".")[0] == "hfstrat":
                    below = dotted.removeprefix("hfstrat").removeprefix(".")
                    found[name].add(below if below in known else below.rpartition(".")[0])
    return found


def package(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_floor() -> None:
    assert {package(name) for name in modules()} - {""} <= set(FLOOR)


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if target and name and package(name) != package(target) and FLOOR[package(target)] >= FLOOR[package(name)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_circle_of_files() -> None:
    left = imports() | {"": set()}  # the names that hfstrat offers are imported when they are used
    while free := [name for name, targets in left.items() if not (targets - {name}) & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other in a circle (or import one that does): {sorted(left)}"
