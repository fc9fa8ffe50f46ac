"""What a page consists of. A block says what is shown; `blocks.html.jinja` has a macro of its `kind` that says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

LONGEST = 2_000  # characters of a text that is shown
NOTE = 80  # characters for the note about what is left out
MOST_CARDS = 24
MOST_ROWS = 200  # of a table
GOOD, BAD, UNCLEAR, PLAIN = "good", "bad", "unclear", "plain"  # tones of a sentence
TONES = {GOOD: "Good", BAD: "Attention", UNCLEAR: "Unclear", PLAIN: "Note"}  # in words, since a color alone is not read


class Block:
    """A part of a section."""

    kind: ClassVar[str]


class Line(NamedTuple):
    """A sentence with its tone."""

    text: str
    tone: str = PLAIN

    @property
    def word(self) -> str:
        """The tone in a word."""
        return TONES[self.tone]


@dataclass(frozen=True)
class Prose(Block):
    """Paragraphs; `faint` ones explain how to read what is above."""

    lines: Sequence[str]
    look: str = ""  # "", faint or bad
    kind: ClassVar[str] = "prose"


@dataclass(frozen=True)
class Verdict(Block):
    """What came out, in one sentence, and what it rests on."""

    headline: Line
    lines: Sequence[Line] = ()
    kind: ClassVar[str] = "verdict"


@dataclass(frozen=True)
class Bullets(Block):
    """A list of sentences, each with a command or a setting to try, or without one ("")."""

    lines: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "bullets"


class Fact(NamedTuple):
    """A named value, and a note below it."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts(Block):
    """Named values as tiles."""

    facts: Sequence[Fact]
    kind: ClassVar[str] = "facts"


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    best: bool = False
    mark: int | None = None  # the number of a curve, whose marker is shown
    folded: str = ""  # the word behind which the text is hidden
    shade: str = ""  # of a heat map, from 0 to 1


class Row(NamedTuple):
    """A line of a table; the first cell is its header."""

    cells: Sequence[Cell | str]
    classes: str = ""  # lead, first
    indented: bool = False


@dataclass(frozen=True)
class Table(Block):
    """A table with a caption. Rows beyond `MOST_ROWS` are left out, with a note.

    look: "" (values), `sheet` (recipes side by side, with long cells), or `heat` (a matrix).
    """

    caption: str
    head: Sequence[Cell | str]
    rows: Sequence[Row]
    look: str = ""
    kind: ClassVar[str] = "table"

    @property
    def shown(self) -> Sequence[Row]:
        return self.rows[:MOST_ROWS]

    @property
    def left_out(self) -> int:
        return max(0, len(self.rows) - MOST_ROWS)


@dataclass(frozen=True)
class Charts(Block):
    """Charts of `hfstrat.pages.charts` as SVG, and a legend: the number of each curve and its name."""

    charts: Sequence[str]
    legend: Sequence[tuple[int, str]] = ()
    kind: ClassVar[str] = "charts"


class Piece(NamedTuple):
    """A part of a text that contributes to the loss, or does not; or what is left out there, in words."""

    text: str
    is_supervised: bool = False
    is_omission: bool = False


class Part(NamedTuple):
    """A text with a heading, such as an answer before training."""

    heading: str
    text: str = ""
    pieces: Sequence[Piece] = ()  # instead of the text


class Picture(NamedTuple):
    """An image as a data URI, and what it shows."""

    source: str
    description: str


class Card(NamedTuple):
    """An example: a title, texts one below the other, and texts side by side."""

    title: str
    parts: Sequence[Part] = ()
    beside: Sequence[Part] = ()
    picture: Picture | None = None


@dataclass(frozen=True)
class Cards(Block):
    """Examples. Cards beyond `MOST_CARDS` are left out, with a note.

    look: `full` (one below the other) or `small` (as many as fit in a row).
    """

    cards: Sequence[Card]
    look: str = "full"
    kind: ClassVar[str] = "cards"

    @property
    def shown(self) -> Sequence[Card]:
        return self.cards[:MOST_CARDS]

    @property
    def left_out(self) -> int:
        return max(0, len(self.cards) - MOST_CARDS)


@dataclass(frozen=True)
class Figure(Block):
    """A large picture with a caption."""

    picture: Picture
    caption: str
    kind: ClassVar[str] = "figure"


class Bar(NamedTuple):
    """A share of one, and how it is written."""

    name: str
    text: str
    share: float


@dataclass(frozen=True)
class Bars(Block):
    """Shares as bars, in groups with a title."""

    groups: Sequence[tuple[str, Sequence[Bar]]]
    kind: ClassVar[str] = "bars"


@dataclass(frozen=True)
class Fold(Block):
    """Tables that are closed at first."""

    name: str
    tables: Sequence[Table]
    kind: ClassVar[str] = "fold"


@dataclass(frozen=True)
class Code(Block):
    """Text in a fixed width: commands, a recipe."""

    text: str
    name: str  # what it is, for screen readers
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    title: str
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Page:
    """A page: its title, sections, and a line at the end."""

    title: str
    sections: Sequence[Section]
    about: str = ""  # what this is a report of, below the title
    footer: str = ""
    colors: int = field(default=8)


def cut(text: str, most: int = LONGEST) -> str:
    """A text of about `most` characters; of a longer one the beginning, and how much is left out; idempotent."""
    return text if len(text) <= most + NOTE else f"{text[:most]} … ({len(text) - most:,} more characters are not shown)"


def shorten(text: str, most: int) -> str:
    """A name that fits into a cell."""
    return text if len(text) <= most else text[: most - 1] + "…"
