"""What may be said in public: no folders of this machine, no secrets, no rows of the data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfstrat.tasks.report import Report

REMOVED = "(removed)"
LONGEST = 200  # characters of a string in a published report; what is longer is somebody's text
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
# an absolute path, one of a home folder, one of Windows: at its begin stands nothing that would make it part of a word or a URL
PATHS = re.compile(r"(?:(?<![\w:/.<>\])])(?:file://)?(?:/|~/)(?:[\w.@+~*-]+/)+[\w.@+~*-]*)|(?:\b[A-Za-z]:\\[^\s\"'<>|]+)")
ROWS = re.compile(
    r"^(answers|samples?|examples?|.*_examples|prompts?|completions?|references?|messages?|texts?|rows_shown|shown)$"
)
NAMES_OF_PATHS = {
    "path",
    "train",
    "eval",
    "output_dir",
    "resume",
    "template",
    "name_or_path",
    "tokenizer",
    "adapter",
    "model_class",
}
SUFFIXES = {
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".gz",
    ".yaml",
    ".yml",
    ".gguf",
    ".jinja",
    ".py",
    ".md",
}


class Scrubber:
    """Takes out of strings what is local to this machine: paths keep their last part, secrets nothing.

    Args:
        recipe: of the run, whose paths are known for paths even where they are relative or hold blanks.
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

    def text(self, text: str) -> str:
        """One string without its paths and secrets."""
        for secret in self.secrets:
            text = text.replace(secret, REMOVED)
        text = SECRETS.sub(REMOVED, text)
        for path in self.paths:
            text = re.sub(rf"(?<![\w/.]){re.escape(path)}(?![\w])", self._last(path), text)
        for folder in self.above:  # another file beside one that is known; their names may hold blanks
            text = re.sub(rf"{re.escape(folder)}(/[\w.@+~*-]+)+", lambda match: self._last(match.group()), text)
        text = PATHS.sub(lambda match: self._last(match.group()), text)
        for folder in self.folders:
            text = text.replace(folder, "~")
        return text

    def _last(self, path: str) -> str:
        """The last part of a path, of a glob too; of a home folder nothing, it is somebody's name."""
        if path.rstrip("/") in self.folders:
            return "~"
        return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or REMOVED

    def value(self, value: Any) -> Any:
        """The same of everything in a JSON value, names of keys included; what a key calls a secret is removed."""
        if isinstance(value, dict):
            cleaned: dict[str, Any] = {}
            for name, each in value.items():
                key = said = self.text(str(name))
                while key in cleaned:  # two files of one name in two folders
                    key = f"{said} ({len(cleaned)})"
                cleaned[key] = REMOVED if isinstance(each, str) and SECRET_KEYS.match(str(name)) else self.value(each)
            return cleaned
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        if isinstance(value, str | Path):
            return self.text(str(value))
        return value

    def leaks(self, text: str) -> list[str]:
        """What of this machine or of its secrets is in a text all the same, without saying secrets."""
        found = [f"the folder {folder}" for folder in self.folders if f"{folder}/" in text]
        found += [f"the path {path}" for path in self.paths if path.startswith("/") and path in text]
        if SECRETS.search(text) or any(secret in text for secret in self.secrets):
            found.append("something that looks like a token or a password")
        return found


def without_rows(value: Any) -> Any:
    """A result without what it quotes of the data: answers, samples, and any text that is longer than a name."""
    if isinstance(value, dict):
        quotes = {name for name, each in value.items() if isinstance(each, str | list) and ROWS.match(str(name))}
        return {name: without_rows(each) for name, each in value.items() if name not in quotes}
    if isinstance(value, list):
        return [without_rows(each) for each in value if not (isinstance(each, str) and len(each) > LONGEST)]
    if isinstance(value, str) and len(value) > LONGEST:
        return REMOVED
    return value


def published_report(report: Report, scrubber: Scrubber) -> dict[str, Any]:
    """A report as it goes up: no origins (they name files), no rows, no paths, no secrets.

    Answers stay where the recipe itself holds the prompts: nothing else of them is data.
    """
    own = report.run.recipe.evaluation.prompts
    answers = [answer.model_dump() for answer in report.finished.answers if answer.prompt in own]
    public = report.model_dump(
        mode="json", exclude={"run": {"source", "origins"}, "result": {"hub", "artifact", "resumed_from"}}
    )
    public["run"]["data"] = without_rows(public["run"].get("data", {}))
    public["result"] = without_rows(public["result"]) | ({"answers": answers} if answers else {})
    scrubbed: dict[str, Any] = scrubber.value(public)
    return scrubbed


def _paths(value: Any, name: str = "") -> Iterator[str]:
    """The strings of a recipe that are paths: there on this disk, or by their key and look."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _paths(each, str(key))
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each, name)
    elif isinstance(value, str) and ("/" in value or "\\" in value) and "\n" not in value and len(value) < 4096:
        looks_so = value.startswith(("/", "~", ".")) or "*" in value or value.count("/") > 1 or Path(value).suffix in SUFFIXES
        if "://" not in value and (_exists(value) or (looks_so and name in NAMES_OF_PATHS)):
            yield value


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError):  # a text that no file can be called
        return False


def _secrets_at_hand() -> set[str]:
    """Tokens and passwords of this process's environment and of `hf auth login`: they are nowhere to be said."""
    from huggingface_hub import get_token

    found = {value for name, value in os.environ.items() if SECRET_VARIABLES.search(name) and len(value) >= 12}
    return {secret for secret in (*found, get_token()) if secret}
