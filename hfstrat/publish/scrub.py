"""What is published names nothing local: Hub ids and hashes instead of paths; no secrets and no examples of the data."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfstrat.tasks.report import Report

REMOVED = "(removed)"
LONGEST = 200  # characters of a string in a published report; longer ones are text of the data
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
)
SECRET_KEYS = re.compile(  # not eos_token and its like
    r"^((.*_)?(hub|hf|access|auth|api|bearer)_token|token|.*secret.*|.*passw.*|.*api_?key|.*private_?key|.*credentials?)$",
    re.IGNORECASE,
)
SECRET_VARIABLES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)(_|$)", re.IGNORECASE)
# an absolute path, one in a home folder, one of Windows; not in the middle of a word or a URL
PATHS = re.compile(r"(?:(?<![\w:/.<>\])])(?:file://)?(?:/|~/)(?:[\w.@+~*-]+/)+[\w.@+~*-]*)|(?:\b[A-Za-z]:\\[^\s\"'<>|]+)")
ROWS = re.compile(
    r"^(answers|samples?|examples?|.*_examples|prompts?|completions?|references?|messages?|texts?|rows_shown|shown)$"
)
NAMES_OF_PATHS = {  # keys of a recipe
    *("path", "train", "eval", "output_dir", "resume_from_checkpoint", "template"),
    *("name_or_path", "tokenizer", "adapter", "model_class"),
}
SUFFIXES = {
    *(".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz"),
    *(".yaml", ".yml", ".gguf", ".jinja", ".py", ".md"),
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CACHED = re.compile(r"(?:models|datasets)--([\w.-]+?)(?:--([\w.-]+))?/snapshots/([0-9a-f]{40})")


class Scrubber:
    """Removes from strings what is local to this machine: paths keep their last part, secrets are removed.

    Args:
        recipe: of the run; its paths are recognized even where they are relative or contain spaces.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        found = set(_paths(recipe))
        found |= {str(Path(text).expanduser().absolute()) for text in found}
        self.paths = sorted(found, key=len, reverse=True)
        above = {
            str(folder) for path in found if path.startswith("/") for folder in Path(path).parents if len(folder.parts) > 2
        }
        self.above = sorted(above, key=len, reverse=True)
        self.folders = {str(folder) for folder in (Path.home(), Path.cwd()) if len(str(folder)) > 1}
        self.secrets = _secrets_at_hand()
        self.text = functools.cache(self._text)  # a report repeats its keys for each step

    def _text(self, text: str) -> str:
        """The text without paths and secrets."""
        for secret in self.secrets:
            text = text.replace(secret, REMOVED)
        text = SECRETS.sub(REMOVED, text)
        for path in self.paths:
            text = re.sub(rf"(?<![\w/.]){re.escape(path)}(?![\w])", self._last(path), text)
        for folder in self.above:  # another file next to a known one; names may contain spaces
            text = re.sub(rf"{re.escape(folder)}(/[\w.@+~*-]+)+", lambda match: self._last(match.group()), text)
        text = PATHS.sub(lambda match: self._last(match.group()), text)
        for folder in self.folders:
            text = text.replace(folder, "~")
        return text

    def _last(self, path: str) -> str:
        """The last part of a path or glob; '~' for a home folder, whose name is that of a person."""
        if path.rstrip("/") in self.folders:
            return "~"
        return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or REMOVED

    def value(self, value: Any) -> Any:
        """A JSON value without paths and secrets, keys included; the values of secret keys are removed."""
        if isinstance(value, dict):
            cleaned: dict[str, Any] = {}
            for name, each in value.items():
                key = cleaned_name = self.text(str(name))
                while key in cleaned:  # two files of one name in two folders
                    key = f"{cleaned_name} ({len(cleaned)})"
                cleaned[key] = REMOVED if isinstance(each, str) and SECRET_KEYS.match(str(name)) else self.value(each)
            return cleaned
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        if isinstance(value, str | Path):
            return self.text(str(value))
        return value

    def quotes(self, value: Any) -> Any:
        """A JSON value that quotes data: a path in it is part of the text, and only this machine's folders and secrets go."""
        if isinstance(value, dict):
            return {name: self.quotes(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.quotes(each) for each in value]
        if not isinstance(value, str):
            return value
        for secret in self.secrets:
            value = value.replace(secret, REMOVED)
        text = SECRETS.sub(REMOVED, value)
        for folder in (*self.above, *self.folders):
            text = text.replace(folder, "~")
        return text

    def leaks(self, text: str) -> list[str]:
        """What a text still reveals of this machine; secrets are not quoted."""
        found = [f"the folder {folder}" for folder in self.folders if f"{folder}/" in text]
        found += [f"the path {path}" for path in self.paths if path.startswith("/") and path in text]
        if SECRETS.search(text) or any(secret in text for secret in self.secrets):
            found.append("something that looks like a token or a password")
        return found


def without_rows(value: Any) -> Any:
    """A result without quotes of the data: answers, samples, and all text that is longer than a name."""
    if isinstance(value, dict):
        quotes = {name for name, each in value.items() if isinstance(each, str | list) and ROWS.match(str(name))}
        return {name: without_rows(each) for name, each in value.items() if name not in quotes}
    if isinstance(value, list):
        return [without_rows(each) for each in value if not (isinstance(each, str) and len(each) > LONGEST)]
    if isinstance(value, str) and len(value) > LONGEST:
        return REMOVED
    return value


def _public_reward(reward: str | dict[str, Any]) -> dict[str, Any]:
    """A reward without its folder and the arguments of its function."""
    given = {"name": reward} if isinstance(reward, str) else reward
    kept = {key: value for key, value in given.items() if key != "kwargs"}
    return kept | {"name": re.split(r"[/\\]", str(given["name"]))[-1]}


def published_report(report: Report, scrubber: Scrubber) -> dict[str, Any]:
    """The report as it is published: without origins (they name files), examples, paths and secrets.

    Answers to prompts of the recipe are kept: they contain no data.
    """
    own = report.run.recipe.evaluation.prompts
    answers = [answer.model_dump() for answer in report.finished.answers if answer.prompt in own]
    public = report.model_dump(
        mode="json", exclude={"run": {"source", "origins"}, "result": {"hub", "artifact", "resumed_from"}}
    )
    objective = public["run"]["recipe"]["objective"]
    if "rewards" in objective:
        objective["rewards"] = [_public_reward(reward) for reward in objective["rewards"]]
    public["run"]["data"] = without_rows(public["run"].get("data", {}))
    public["result"] = without_rows(public["result"]) | ({"answers": answers} if answers else {})
    scrubbed: dict[str, Any] = scrubber.value(public)
    return scrubbed


def _paths(value: Any, name: str = "") -> Iterator[str]:
    """The strings of a recipe that are paths: they exist on this disk, or their key and form imply it."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _paths(each, str(key))
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each, name)
    elif isinstance(value, str) and ("/" in value or "\\" in value) and "\n" not in value and len(value) < 4096:
        is_path_like = (
            value.startswith(("/", "~", ".")) or "*" in value or value.count("/") > 1 or Path(value).suffix in SUFFIXES
        )
        if "://" not in value and (_exists(value) or (is_path_like and name in NAMES_OF_PATHS)):
            yield value


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):  # not a valid file name
        return False


def _secrets_at_hand() -> set[str]:
    """Tokens and passwords in the environment of this process and of `hf auth login`."""
    from huggingface_hub import get_token

    found = {value for name, value in os.environ.items() if SECRET_VARIABLES.search(name) and len(value) >= 12}
    return {secret for secret in (*found, get_token()) if secret}


# base model and data


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
    path, license = Path(source).expanduser(), license_of(source, "model")
    if found := CACHED.search(str(path.absolute())):
        owner, name, commit = found.groups()
        return Base(f"{owner}/{name}" if name else owner, commit, name or owner, None, license)
    if path.exists() or not HUB_ID.fullmatch(source):
        return Base("", None, path.name, known, license)
    if known and len(known) == 64:  # a hash over weights and not a commit: of a relative folder that no longer exists
        return Base("", None, path.name, known, None)
    commit = known if known and re.fullmatch(r"[0-9a-f]{40}", known) else model.revision
    return Base(source, commit, source.split("/")[-1], None, license)


def is_hub_data(source: str) -> bool:
    """Whether a data source is a Hub id."""
    path = Path(source).expanduser()
    return "/" in source and bool(HUB_ID.fullmatch(source)) and not path.exists() and not path.suffix


def license_of(source: str, kind: str) -> str | None:
    """The license in the card next to a model or dataset, or in its card in the Hub's cache."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    path = Path(source).expanduser()
    if path.exists():
        card: Any = (path if path.is_dir() else path.parent) / "README.md"
    else:
        card = try_to_load_from_cache(source, "README.md", repo_type=kind) if HUB_ID.fullmatch(source) else None
    try:
        license = (metadata_load(card) or {}).get("license") if isinstance(card, str | Path) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return ", ".join(map(str, license)) if isinstance(license, list) else (str(license) if license else None)
