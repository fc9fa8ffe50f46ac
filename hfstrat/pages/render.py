"""From a `Page` to HTML. Whatever the texts are, the result is one valid document that loads nothing."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hfstrat.pages import charts
from hfstrat.pages.blocks import Page, Section, cut

HERE = Path(__file__).parent
STYLE = HERE / "style.css"
# control characters (but tab and line feed), marks that reverse the direction of text, and halves of characters
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


@functools.cache
def environment() -> Environment:
    """The templates, compiled once in a process."""
    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["cut"] = cut
    return found


def render(page: Page) -> str:
    """The page as one HTML document."""
    html = (
        environment()
        .get_template("page.html.jinja")
        .render(
            page=page,
            sections=named(page.sections),
            style=Markup(STYLE.read_text(encoding="utf-8").strip()),
            marker=lambda number: Markup(charts.marker(number, 7, 7, 4.6)),
            numbers=itertools.count(1).__next__,  # for ids
            svg=Markup,
        )
    )
    return visible(html)


def named(sections: Any) -> list[tuple[str, Section]]:
    """The sections with an id for each."""
    taken, found = set[str](), list[tuple[str, Section]]()
    for section in sections:
        name = base = charts.slug(section.title) or "section"
        for number in itertools.count(2):
            if name not in taken:
                break
            name = f"{base}-{number}"
        taken.add(name)
        found.append((name, section))
    return found


def visible(text: str) -> str:
    """The text with visible symbols for what a browser does not show: of a control character its own, else a question mark."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return UNSHOWABLE.sub(symbol, text.replace("\r\n", "\n"))
