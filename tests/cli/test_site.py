"""The site of the documentation: strict links, nothing from other hosts, every page reachable."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("material", reason="needs the extra docs")

ROOT = Path(__file__).parents[2]
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "audio": "src", "video": "src", "embed": "src"}
LOADING |= {"link": "href", "object": "data", "use": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loads(HTMLParser):
    """Collects what a page loads, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADING and not (tag == "link" and given.get("rel") in ("canonical", "prev", "next")):
            self.loaded.append(given.get(LOADING[tag]) or "")
        if tag == "a":
            self.links.append(given.get("href") or "")
        self.classes |= set((given.get("class") or "").split())


def read(page: Path) -> Loads:
    found = Loads()
    found.feed(page.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    """Neither by a page nor by a style sheet; the theme loads mermaid from elsewhere, but only for pages that use it."""
    for page in site.rglob("*.html"):
        found = read(page)
        assert not [target for target in found.loaded if "//" in target], page
        assert "mermaid" not in found.classes, page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_every_page_is_in_the_navigation_and_every_key_on_a_page(site: Path) -> None:
    linked = {target.partition("#")[0] for target in read(site / "index.html").links}
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.stem}.html" in linked, page
    for name in ("keys", "commands", "trl", "axolotl", "llama-factory"):
        assert f"docs/reference/{name}.html" in linked
    assert "per_device_train_batch_size" in (site / "docs" / "reference" / "keys.html").read_text(encoding="utf-8")
    assert "hfstrat migrate" in (site / "docs" / "reference" / "commands.html").read_text(encoding="utf-8")
    index = (site / "llms.txt").read_text(encoding="utf-8")
    assert all((site / target).is_file() for target in re.findall(r"\]\(([^)]+)\)", index))


@pytest.mark.slow
def test_search_is_local(site: Path) -> None:
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
    assert list((site / "assets" / "javascripts" / "workers").glob("search*.js"))
