"""Whether the lines of a .txt file are parts of one text rather than texts of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

MIN_LINES = 10  # of which less is known
LINES = 2000  # looked at
BLANK = 0.05  # share of blank lines, from which they separate paragraphs
INDENTED = 0.2  # share of indented lines, from which they are code or verse
FULL = 0.5  # share of the lines within a paragraph that have no room for the next word
WIDTHS = (40, 120)  # characters of a line that was wrapped by hand or by an editor
OPEN = 0.4  # share of the lines that do not end a sentence
DISTINCT = 0.1  # different first words per line: sentences made from one pattern have fewer


def describe(lines: Sequence[str]) -> str:
    """Why the lines look like parts of one text, in words; "" if they do not."""
    filled = [line for line in lines if line.strip()]
    lines = "\n".join(lines).strip().split("\n")  # blank lines at the ends separate nothing
    if len(filled) < MIN_LINES:
        return ""
    if len(lines) - len(filled) >= max(2, BLANK * len(lines)):
        return "blank lines separate paragraphs"
    if sum(line[0] in " \t" for line in filled) >= INDENTED * len(filled):
        return "many lines are indented"
    return "lines are wrapped at a fixed width" if _is_wrapped(filled) else ""


def _is_wrapped(lines: list[str]) -> bool:
    """Whether nearly every line is so long that the first word of the next one would not fit the width."""
    width = sorted(map(len, lines))[-1 - len(lines) // 10]
    first_words = {line.split()[0] for line in lines}
    if not WIDTHS[0] <= width <= WIDTHS[1] or len(first_words) < DISTINCT * len(lines):
        return False
    inside = [(a, b) for a, b in pairwise(lines) if " " in a.strip()]
    is_open = sum(a.rstrip()[-1] not in ".!?:;\"'" for a, _ in inside)
    full = sum(len(a.rstrip()) + 1 + len(b.split()[0]) > width for a, b in inside)
    return len(inside) >= MIN_LINES - 1 and full >= FULL * len(inside) and is_open >= OPEN * len(inside)
