"""Access to a Hub repository, checked with clear errors and repeated requests, and the files that are uploaded.

Uploaded is a folder with links to the weights and cleaned copies of the other files; only listed files are included."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hfstrat.errors import UserError
from hfstrat.publish import card, provenance
from hfstrat.publish.scrub import Scrubber, published_report
from hfstrat.recipe.schema import Hub
from hfstrat.tasks.report import Report

Result = TypeVar("Result")


LATER = "set hub.push_to_hub=false, and `hfstrat push RUN --repo NAME` later"


BRIEF, PATIENT = (1.0, 4.0), (2.0, 10.0, 30.0)  # seconds between attempts: before training, and for an upload


LONGEST_WAIT = 120.0  # seconds of a Retry-After header, at most


@dataclass(frozen=True)
class Place:
    """A repository that this token may write to."""

    repo: str  # with its namespace
    user: str
    role: str  # of the token
    private: bool | None  # None: it does not exist yet


def look(settings: Hub, key: str, waits: tuple[float, ...]) -> Place:
    """The state of the repository, if this token may write to it.

    Raises:
        UserError: why it cannot be written to, and what to change.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo = settings.repo_id or ""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"hub.repo_id: {repo}: {first_line(error)}; expected owner/name, such as me/my-model") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: {repo} cannot be reached because HF_HUB_OFFLINE is set; unset it, or {LATER}")
    if not get_token():
        raise UserError(f"{key}: no Hub token was found; run `hf auth login` or set HF_TOKEN, or {LATER}")
    hub = api()
    who = with_reason(hub.whoami, repo, waits)
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role") or "unknown"
    if role == "read":
        raise UserError(
            f"{key}: the token of {who['name']} is read-only; create one with write permission and run `hf auth login`"
        )
    repo = repo if "/" in repo else f"{who['name']}/{repo}"
    mine = {who["name"], *(org["name"] for org in who.get("orgs") or [])}
    exists = with_reason(lambda: _private(hub, repo), repo, waits)
    if exists is None:
        if repo.split("/")[0] not in mine:
            raise UserError(
                f"hub.repo_id: {repo} does not exist, and {who['name']} cannot create it: expected one of "
                f"{', '.join(f'{name}/...' for name in sorted(mine))}"
            )
        return Place(repo, who["name"], role, None)
    with_reason(lambda: hub.auth_check(repo, write=True), repo, waits)
    if settings.private and not exists:
        raise UserError(
            f"hub.private: {repo} is public, but hub.private is true; set hub.private=false, or name another repository"
        )
    return Place(repo, who["name"], role, exists)


def with_reason(call: Callable[[], Result], repo: str, waits: tuple[float, ...]) -> Result:
    """The result of a call to the Hub; errors become sentences.

    Raises:
        UserError: the Hub refuses, or does not answer.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return repeated(call, waits)
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the token is not valid; run `hf auth login`, or set HF_TOKEN",
            403: "this token may not write there; check the name, or give the token write permission",
        }
        why = reasons.get(status, f"the Hub answers {status} ({first_line(error)}); wait, or {LATER}")
        raise UserError(f"hub.repo_id: {repo}: {why}") from error
    except Exception as error:  # the transport has many ways to fail
        if not _passes(error):
            raise
        raise UserError(f"hub.repo_id: {repo}: the Hub cannot be reached ({first_line(error)}); wait, or {LATER}") from error


def _private(api: Any, repo: str) -> bool | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return bool(api.model_info(repo, timeout=30).private)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def repeated(call: Callable[[], Result], waits: tuple[float, ...]) -> Result:
    """Repeat a call after temporary errors: connections, 429 and 5xx. huggingface_hub itself repeats only some requests."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
            time.sleep(max(wait, min(_retry_after(error), LONGEST_WAIT)))
    return call()


def _passes(error: Exception) -> bool:
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(("httpx", "httpcore"))


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0


def api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


WEIGHTS = ("*.safetensors",)


TOKENIZERS = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "spiece.*", "chat_template.jinja", "*.jinja")


CONFIGS = (  # cleaned: they contain local paths
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.safetensors.index.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


LOCAL_KEYS = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "cache_dir", "tokenizer_file", "vocab_file"}


STALE = [
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "modules.json",
]  # of an earlier push, deleted if not part of this one


def stage(run: Path, report: Report, folder: Path, repo: str) -> list[str]:
    """Fill the empty `folder` with the files to upload; returns their names, sorted.

    Raises:
        UserError: a file would reveal a path or a secret, so nothing may be uploaded.
    """
    final = run / "final"
    scrubber = Scrubber(report.run.recipe.model_dump())
    base = provenance.base_of(report)
    for file in sorted(path for path in final.rglob("*") if path.is_file()):
        name = file.relative_to(final)
        target = folder / name
        if any(fnmatch(file.name, pattern) for pattern in CONFIGS):
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_json(target, _cleaned(json.loads(file.read_text(encoding="utf-8")), file.name, base, scrubber))
        elif any(fnmatch(file.name, pattern) for pattern in (*WEIGHTS, *TOKENIZERS)):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file.absolute())
    public = published_report(report, scrubber)
    if base and base.hub:
        public["run"]["recipe"]["model"] |= {"name_or_path": base.hub, "revision": base.revision}
    _write_json(folder / "report.json", public)
    recipe = yaml.safe_dump(public["run"]["recipe"], sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "README.md").write_text(card.make(report, final, repo), encoding="utf-8")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{final}: no weights (*.safetensors) to push")
    check_clean(folder, names, scrubber)
    return names


def check_clean(folder: Path, names: list[str], scrubber: Scrubber) -> None:
    """Check the texts to upload and the header of each file of weights.

    Raises:
        UserError: a path, a token or a password of this machine is in one of them.
    """
    for name in names:
        if name.endswith((".jinja", "tokenizer.json", ".txt", ".model")):  # content of the model, not of the run
            continue
        found = scrubber.leaks(_header(folder / name) if name.endswith(".safetensors") else (folder / name).read_text("utf-8"))
        if found:
            raise UserError(f"{name} would reveal {found[0]}, so nothing was pushed; remove it from the recipe and the result")


def _header(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8", "replace")


def _cleaned(value: Any, name: str, base: provenance.Base | None, scrubber: Scrubber) -> Any:
    """A config without local keys and paths; that of an adapter names its base. A chat template in it is kept as is."""
    if not isinstance(value, dict):
        return value if name == "modules.json" else scrubber.value(value)
    kept = {key: each for key, each in value.items() if key not in LOCAL_KEYS}
    if name == "adapter_config.json" and base:
        kept |= {"base_model_name_or_path": base.reference, "revision": base.revision}
    unchanged = {key: kept[key] for key in ("chat_template", "base_model_name_or_path") if key in kept}
    if name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        return {key: each if not _is_path(each) else scrubber.text(each) for key, each in kept.items()} | unchanged
    cleaned: dict[str, Any] = {**scrubber.value(kept), **unchanged}
    return cleaned


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~/")) and value.count("/") > 1


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
