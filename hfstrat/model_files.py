"""What a model's files say without torch: its config, and the shapes of its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from hfstrat.config import Model


def read_config(model: Model) -> dict[str, Any] | None:
    """The local `config.json`, without torch; None where there is none to read."""
    file = Path(model.name_or_path).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"model.name_or_path: {file} is no valid JSON: {error}") from None
    return config if isinstance(config, dict) else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameter shapes from the headers of a folder's safetensors files, without torch; empty if there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes
