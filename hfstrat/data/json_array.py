"""One big JSON list, an item at a time: memory is that of the largest item, not of the file.

Python's own decoder reads each item, so the values are those of `json.load`, and no dependency is needed: a streaming
parser (ijson) would make numbers and errors of its own. Where the text that was read so far ends inside an item, the decoder
says so, more is read, at least as much again, and the item is decoded anew: each character is looked at a few times at most.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

CHUNK = 1 << 19  # characters
LONGEST_WORD = 16  # -Infinity, an escape, an exponent: what a cut may make a mistake of that is none
_SPACE = re.compile(r"[ \t\n\r]*")


class Broken(ValueError):
    """What is wrong, with the line and column (from 1) that `json.load` would name."""

    def __init__(self, msg: str, lineno: int, colno: int) -> None:
        super().__init__(msg)
        self.msg, self.lineno, self.colno = msg, lineno, colno


def items(file: IO[str], chunk: int = CHUNK) -> Iterator[Any]:
    """The items of the list that a text file holds.

    Raises:
        Broken: it is no list, or no valid JSON; the items before that place have been given by then.
    """
    window = _Window(file, chunk)
    if window.next() != "[":
        raise window.broken("Expecting value")
    window.at += 1
    if window.next() != "]":
        yield window.value()
        while (sign := window.next()) == ",":
            window.at += 1
            window.next()
            yield window.value()
        if sign != "]":
            raise window.broken("Expecting ',' delimiter")
    window.at += 1
    if window.next():
        raise window.broken("Extra data")


class _Window:
    """The part of a text that has been read and is still needed, and where it begins."""

    def __init__(self, file: IO[str], chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 0  # of the first character; columns from 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> None:
        """Forget what lies behind, and read on: at least as much as is kept."""
        self.line, self.column = self.place(self.at)
        self.column -= 1
        rest = self.text[self.at :]
        new = self.file.read(max(self.chunk, len(rest)))
        self.text, self.at, self.ended = rest + new, 0, not new

    def next(self) -> str:
        """The next character that is no white space, not yet passed; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end + LONGEST_WORD < len(self.text) or self.ended:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - LONGEST_WORD or error.msg.startswith("Unterminated string")
                if self.ended or not cut:
                    raise self.broken(error.msg, error.pos) from None
            self.more()

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - self.text.rfind("\n", 0, at) + (0 if lines else self.column)

    def broken(self, msg: str, at: int | None = None) -> Broken:
        return Broken(msg, *self.place(self.at if at is None else at))
