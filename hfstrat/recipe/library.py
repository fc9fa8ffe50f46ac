"""The bundled recipes and Accelerate configs: one copy, in the wheel or in the checkout."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from hfstrat.errors import UserError


def folder(kind: str) -> Path:
    """The folder `recipes` or `accelerate_configs`, in the wheel or in an editable checkout."""
    package = Path(__file__).parents[1]
    in_wheel = package / "_shipped" / kind
    return in_wheel if in_wheel.is_dir() else package.parent / kind


def names(kind: str) -> list[str]:
    """The names of the bundled files of a kind, without suffix."""
    root = folder(kind)
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def find(kind: str, name: str) -> Path:
    """The file of that name. Raises UserError with the nearest name if none exists."""
    file = folder(kind) / f"{name.removesuffix('.yaml')}.yaml"
    if file.is_file():
        return file
    known = names(kind)
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"{name}: no such name among the bundled {kind}; {hint}expected one of {', '.join(known)}")


def title(file: Path) -> str:
    """The first comment line of a file: its purpose."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
