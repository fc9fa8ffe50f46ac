"""Where a result comes from: base model, data and their licenses, named by a Hub id or a hash, never by a local path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from hfstrat.tasks.report import Report

_CACHED = re.compile(r"(?:models|datasets)--([\w.-]+?)(?:--([\w.-]+))?/snapshots/([0-9a-f]{40})")


@dataclass(frozen=True)
class Base:
    """The weights that a run started from. `hub` is an id, or "" for a local model."""

    hub: str
    revision: str | None  # a commit, if known
    name: str  # of the folder or file, without its path
    sha256: str | None  # over the weights of a local one
    license: str | None

    @property
    def reference(self) -> str:
        """The base in the config of an adapter: an id, or words that cannot be mistaken for one."""
        if self.hub:
            return self.hub
        return f"local model {self.name!r}" + (f" (weights' sha256 {self.sha256})" if self.sha256 else "")


def base_of(report: Report) -> Base | None:
    """The base of a run; None if it started from random weights."""
    model, known = report.run.recipe.model, report.environment.model_sha256
    source = model.name_or_path
    if not source or report.run.recipe.strategy.random_weights:
        return None
    path = Path(source).expanduser()
    if found := _CACHED.search(str(path.absolute())):
        owner, name, commit = found.groups()
        return Base(f"{owner}/{name}" if name else owner, commit, name or owner, None, license_next_to(path))
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return Base("", None, path.name, known, license_next_to(path))
    if _is_local(source, known):
        return Base("", None, path.name, known, None)
    commit = known if known and re.fullmatch(r"[0-9a-f]{40}", known) else model.revision
    return Base(source, commit, source.split("/")[-1], None, license_cached(source, "model"))


def _is_local(source: str, known: str | None) -> bool:
    """Whether the source is a relative folder that no longer exists: the report has a hash over its weights, not a commit."""
    return known is not None and len(known) == 64


def data_license(source: str) -> str | None:
    """The license of a data source, if its card names one."""
    path = Path(source).expanduser()
    if path.exists():
        return license_next_to(path)
    return license_cached(source, "dataset") if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) else None


def is_hub_data(source: str) -> bool:
    """Whether a data source is a Hub id."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not Path(source).expanduser().exists() and not Path(source).suffix


def license_next_to(path: Path) -> str | None:
    """The license in the card of a folder (or next to a file)."""
    return _license(path / "README.md" if path.is_dir() else path.parent / "README.md")


def license_cached(source: str, kind: str) -> str | None:
    """The license in the cached card of a Hub repository."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "README.md", repo_type=kind)
    return _license(Path(found)) if isinstance(found, str) else None


def _license(card: Path) -> str | None:
    try:
        found = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        data = yaml.safe_load(found.group(1)) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    license = data.get("license") if isinstance(data, dict) else None
    return ", ".join(map(str, license)) if isinstance(license, list) else (str(license) if license else None)
