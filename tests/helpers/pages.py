"""What every page has to be: valid, loading nothing, and usable with a keyboard and a screen reader."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "img"}  # SVG closes its own
LOADING = ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href", "formaction", "ping")
FORBIDDEN = {"script", "iframe", "object", "embed", "form", "input", "base", "applet", "audio", "video"}
REFERENCES = ("aria-labelledby", "aria-describedby", "for", "headers")
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Reader(HTMLParser):
    """The tags of a page in their order, and its text. Fails on tags that are not closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []  # name, attributes, what it is in
        self.parts: list[tuple[str, str]] = []  # the innermost tag, and text
        self.declared = ""

    def handle_decl(self, decl: str) -> None:
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.parts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """What is read aloud, without the style."""
        return "".join(text for tag, text in self.parts if tag != "style")

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def named(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.tags if name in names]


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def check(text: str) -> Reader:
    """All laws of a page; returns what was read."""
    text.encode("utf-8")
    found = read(text)
    _loads_nothing(text, found)
    _is_labeled(found)
    _has_landmarks(found)
    _has_tables(found)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), "a character that is not shown"
    return found


def _loads_nothing(text: str, found: Reader) -> None:
    ids = {attributes["id"] for _, attributes, _ in found.tags if "id" in attributes}
    for name, attributes, _ in found.tags:
        assert name not in FORBIDDEN, name
        assert not [key for key in attributes if key.startswith("on")], f"{name} has a script"
        for key in LOADING:
            value = attributes.get(key)
            if value is not None and value != "data:,":
                assert value.startswith("data:image/jpeg;base64,") or value[1:] in ids, f"{name} loads {value[:80]}"
    style = "".join(content for tag, content in found.parts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(each["content"] for each in found.named("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    assert found.declared.lower() == "doctype html"


def _is_labeled(found: Reader) -> None:
    ids = [attributes["id"] for _, attributes, _ in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), sorted(name for name in ids if ids.count(name) > 1)
    for name, attributes, inside in found.tags:
        for key in REFERENCES:
            for wanted in (attributes.get(key) or "").split():
                assert wanted in ids, f"{name} refers to {wanted}"
        if name == "img":
            assert attributes.get("alt"), "an image without a description"
        if name == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes.get("role") == "img"
            assert attributes.get("aria-labelledby")
            assert attributes.get("aria-describedby")
        if attributes.get("tabindex") == "0":
            assert attributes.get("role") == "region"
            assert attributes.get("aria-label"), f"{name} can be focused and has no name"
        assert name not in ("a", "summary") or "a" not in inside
    assert len(found.named("desc")) == len([each for each in found.named("svg") if "role" in each])


def _has_landmarks(found: Reader) -> None:
    for name in ("header", "nav", "main", "footer"):
        assert len(found.named(name)) == 1, name
    assert found.named("html") == [{"lang": "en"}]
    levels = [HEADINGS.index(name) + 1 for name, _, _ in found.tags if name in HEADINGS]
    assert levels[0] == 1
    assert levels.count(1) == 1
    for before, after in itertools.pairwise(levels):
        assert after <= before + 1, "a level of headings is left out"
    links = [each["href"] for each in found.named("a")]
    sections = [f"#{each['id']}" for each in found.named("h2")]
    assert links[0] == "#content", "the first link skips the contents"
    assert links[1:] == sections


def _has_tables(found: Reader) -> None:
    assert len(found.named("caption")) == len(found.named("table"))
    for name, attributes, inside in found.tags:
        if name == "th":
            assert attributes.get("scope") == ("col" if "thead" in inside else "row")


def rows_of(text: str) -> dict[str, dict[str, list[str]]]:
    """The tables of a page: by caption, the cells of each line by its header."""

    class Tables(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.tables: dict[str, list[list[str]]] = {}
            self.caption = ""

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            super().handle_starttag(tag, attrs)
            if tag == "table":
                self.caption = ""
            elif tag == "tr":
                self.tables.setdefault(self.caption, []).append([])
            elif tag in ("th", "td"):
                self.tables[self.caption][-1].append("")

        def handle_data(self, data: str) -> None:
            super().handle_data(data)
            if "caption" in self.open:
                self.caption += data
            elif "td" in self.open or "th" in self.open:
                self.tables[self.caption][-1][-1] += data.strip()

    reader = Tables()
    reader.feed(text)
    return {caption: {line[0]: line[1:] for line in lines} for caption, lines in reader.tables.items()}
