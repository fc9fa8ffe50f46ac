"""What a result is made of, said so that others understand it: base, data, their licences; a Hub id or a hash, never a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from hfstrat.tasks.report import Report

_CACHED = re.compile(r"(?:models|datasets)--([\w.-]+?)(?:--([\w.-]+))?/snapshots/([0-9a-f]{40})")


@dataclass(frozen=True)
class Base:
    """The weights that a run started from. `hub` is an id, or "" where they are only on somebody's disk."""

    hub: str
    revision: str | None  # a commit, where it is known
    name: str  # of the folder or file, without where it lies
    sha256: str | None  # over the weights of a local one
    licence: str | None

    @property
    def reference(self) -> str:
        """What an adapter's config says of its base: an id, or words that nobody takes for one."""
        if self.hub:
            return self.hub
        return f"local model {self.name!r}" + (f" (weights' sha256 {self.sha256})" if self.sha256 else "")


def base_of(report: Report) -> Base | None:
    """The base of a run; None where it started from random weights alone."""
    model, known = report.run.recipe.model, report.environment.model_sha256
    source = model.name_or_path
    if not source or report.run.recipe.strategy.random_weights:
        return None
    path = Path(source).expanduser()
    if found := _CACHED.search(str(path.absolute())):
        owner, name, commit = found.groups()
        return Base(f"{owner}/{name}" if name else owner, commit, name or owner, None, licence_beside(path))
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return Base("", None, path.name, known, licence_beside(path))
    if _is_local(source, known):
        return Base("", None, path.name, known, None)
    commit = known if known and re.fullmatch(r"[0-9a-f]{40}", known) else model.revision
    return Base(source, commit, source.split("/")[-1], None, licence_cached(source, "model"))


def _is_local(source: str, known: str | None) -> bool:
    """A relative folder that is not here any more: the report has a hash over its weights, not a commit."""
    return known is not None and len(known) == 64


def data_licence(source: str) -> str | None:
    """The licence of a data source, where its own card says it."""
    path = Path(source).expanduser()
    if path.exists():
        return licence_beside(path)
    return licence_cached(source, "dataset") if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) else None


def is_hub_data(source: str) -> bool:
    """Whether a data source is named by its Hub id."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not Path(source).expanduser().exists() and not Path(source).suffix


def licence_beside(path: Path) -> str | None:
    """What the card in a folder (or beside a file) says."""
    return _licence(path / "README.md" if path.is_dir() else path.parent / "README.md")


def licence_cached(source: str, kind: str) -> str | None:
    """What the card says that the Hub cache holds of a repository."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "README.md", repo_type=kind)
    return _licence(Path(found)) if isinstance(found, str) else None


def _licence(card: Path) -> str | None:
    try:
        found = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        data = yaml.safe_load(found.group(1)) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = data.get("license") if isinstance(data, dict) else None
    return ", ".join(map(str, licence)) if isinstance(licence, list) else (str(licence) if licence else None)
