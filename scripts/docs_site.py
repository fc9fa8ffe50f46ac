"""Hooks of the documentation site: the pages of the repository at their paths in it, and the generated ones.

A page keeps its path (`docs/data.md`, `benchmarks/README.md`), so that its links lead to the same files here and on the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import docs_reference
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"),
    *("benchmarks/README.md", "benchmarks/results/*.md", "recipes/README.md"),
)
REFERENCE = "docs/reference"
MORE = "More"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_config(config: Any) -> Any:
    """Add the pages of docs/ that are not in the navigation."""
    listed = set(_paths(config.nav))
    others = [path for path in _sources("docs/*.md") if path not in listed]
    if others:
        config.nav.append({MORE: others})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The files of the site, in place of those of docs/."""
    found = Files([file for file in files if not file.src_uri.endswith(".md")])
    for pattern in PAGES:
        for path in _sources(pattern):
            found.append(_file(config, path, abs_src_path=str(ROOT / path)))
    for name, text in docs_reference.pages().items():
        found.append(_file(config, f"{REFERENCE}/{name}", content=text))
    for path in sorted(_linked(found) - {file.src_uri for file in found}):
        found.append(_file(config, path, abs_src_path=str(ROOT / path)))
    index = (ROOT / "hfstrat" / "assistants" / "llms.txt").read_text(encoding="utf-8")
    found.append(_file(config, "llms.txt", content=index.replace(".md)", ".html)")))
    return found


def _file(config: Any, path: str, **content: Any) -> File:
    return File.generated(config, path, inclusion=InclusionLevel.INCLUDED, **content)


def _sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [path for each in inner for path in _paths(each)]


def _linked(files: Files) -> set[str]:
    """The files of the repository, other than pages, that pages link to."""
    linked = set()
    for file in files.documentation_pages():
        if file.abs_src_path is None:
            continue
        page = Path(file.abs_src_path)
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            if path.is_file() and path.suffix != ".md" and path.is_relative_to(ROOT):
                linked.add(str(path.relative_to(ROOT)))
    return linked
