"""Markdown that comes out as it is meant, whatever stands in the texts."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any


def table(head: list[str], rows: list[list[str]], numbers: Container[int] = ()) -> str:
    """A Markdown table; `numbers` are the columns that stand to the right."""
    line = ["---:" if column in numbers else "---" for column in range(len(head))]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, line, *cells))


def code(text: Any) -> str:
    return f"`{str(text).replace('`', chr(39))}`" if str(text) else ""


def quoted(text: str) -> str:
    """A text of a model as a block that no Markdown in it can leave."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"\n{fence}text\n{text.strip()}\n{fence}"
