"""Pushing a result to the Hugging Face Hub: access is checked before training; after it, files are uploaded and verified.

The result is on disk first, so a failed upload never fails a run; `hfstrat push RUN` resumes it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hfstrat import errors
from hfstrat.errors import RunError, UserError, first_line
from hfstrat.models import fingerprint
from hfstrat.publish import staging
from hfstrat.recipe import format
from hfstrat.recipe.format import plural
from hfstrat.recipe.schema import Hub, Recipe
from hfstrat.tasks.report import Report, read, write
from hfstrat.tasks.report_parts import HubCommit

Result = TypeVar("Result")
LATER = "set hub.push_to_hub=false, and `hfstrat push RUN --repo NAME` later"
BRIEF, PATIENT = (1.0, 4.0), (2.0, 10.0, 30.0)  # seconds between attempts: before training, and for an upload
LONGEST_WAIT = 120.0  # seconds of a Retry-After header, at most


class Place(NamedTuple):
    """A repository that this token may write to.

    repo: with its namespace.
    role: of the token.
    private: None: it does not exist yet.
    """

    repo: str
    user: str
    role: str
    private: bool | None


def check_access(recipe: Recipe) -> Place | None:
    """Check before training whether the result can be pushed: token, role, name, visibility. Creates nothing.

    Raises:
        UserError: no login, no permission, a different visibility, offline, or no connection.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # the first process checks for all
    return look(recipe.hub, "hub.push_to_hub", BRIEF) if is_wanted(recipe) and is_first else None


def is_wanted(recipe: Recipe) -> bool:
    return recipe.hub.push_to_hub and recipe.hub.repo_id is not None


def prepare(recipe: Recipe) -> list[str]:
    """Create the repository if it does not exist, which is the real test of name and permission; returns lines to print.

    Raises:
        UserError: as `check_access`, or the Hub refuses to create it.
    """
    place = check_access(recipe)
    if place is None:
        return []
    state, private = "exists, write access checked", place.private
    if private is None:
        state, private = "created", recipe.hub.private
        with_reason(lambda: api().create_repo(place.repo, private=private, exist_ok=True), place.repo, BRIEF)
    return [
        f"hub       {place.repo} ({'private' if private else 'public'}): {state} with the {place.role} token of {place.user}; "
        "the Hub does not report in advance whether the upload fits the storage quota"
    ]


def push(recipe: Recipe, run: Path, report: Report) -> list[str]:
    """Upload the verified result of a run if its recipe requests it; returns lines to print. No error here fails the run."""
    if not is_wanted(recipe):
        return []
    try:
        return publish(run, report, recipe.hub)
    except Exception as error:  # the result is safe on disk
        return [f"not pushed       {first_line(error)}; the result is complete on disk; `hfstrat push {run}` tries again"]


def push_run(target: str, repo: str | None, private: bool | None, revision: str | None) -> list[str]:
    """Push a finished run (`hfstrat push RUN`); options override the recipe.

    Raises:
        UserError: no finished run, no repository, no access.
        RunError: the upload failed, or the downloaded files differ.
    """
    run = Path(target).expanduser()
    run = run.parent if run.name == "final" and not (run / "final").exists() else run
    report = read(run)
    if report is None or not (run / "final").is_dir():
        raise UserError(f"{target}: not a finished run (a folder with final/ and report.json), as `hfstrat train` writes it")
    given: dict[str, Any] = {"repo_id": repo or None, "private": private, "revision": revision or None}
    given = {key: value for key, value in given.items() if value is not None}
    settings = Hub.model_validate({**report.run.recipe.hub.model_dump(), "push_to_hub": False, **given})
    if not settings.repo_id:
        raise UserError(f"{target}: its recipe has no hub.repo_id; give one with --repo, such as --repo me/my-model")
    try:
        return publish(run, report, settings)
    except RunError:
        raise
    except Exception as error:
        why = f"{settings.repo_id}: not pushed: {first_line(error)}; the same command resumes the upload"
        raise RunError(why, errors.NOT_PUSHED) from error


def publish(run: Path, report: Report, settings: Hub) -> list[str]:
    """Create the repository if needed, upload, download into an empty cache, compare; adds the commit to the report."""
    hub = api()
    with tempfile.TemporaryDirectory(prefix="hfstrat-push-") as scratch:
        staged, cache = Path(scratch) / "up", Path(scratch) / "down"
        staged.mkdir()
        place = look(settings, "push", PATIENT)
        names = staging.stage(run, report, staged, place.repo)
        size = sum((staged / name).stat().st_size for name in names)
        print(f"pushing          {plural(len(names), 'file')}, {format.file_size(size)}, to {place.repo}")
        repeated(lambda: hub.create_repo(place.repo, private=settings.private, exist_ok=True), PATIENT)
        if settings.revision and settings.revision != "main":
            repeated(lambda: hub.create_branch(place.repo, branch=settings.revision, exist_ok=True), PATIENT)
        commit = repeated(
            lambda: hub.upload_folder(
                repo_id=place.repo,
                folder_path=staged,
                revision=settings.revision,
                commit_message="hfstrat: trained and verified",
                delete_patterns=list(staging.STALE),
            ),
            PATIENT,
        )
        pushed = HubCommit(repo=place.repo, revision=settings.revision, commit=commit.oid)
        report.finished.hub = pushed
        write(report, run)
        compare(place.repo, commit.oid, staged, names, cache)
    pushed.compared = True
    write(report, run)
    branch = f" on {settings.revision}" if settings.revision else ""
    return [
        f"pushed           {hub.endpoint}/{place.repo}{branch}, commit {commit.oid[:12]}",
        f"compared         {plural(len(names), 'file')} were downloaded again into an empty cache: each has the same sha256",
    ]


def compare(repo: str, commit: str, staged: Path, names: list[str], cache: Path) -> None:
    """Download a commit into an empty cache and compare hashes.

    Raises:
        RunError: a file is missing or differs.
    """
    from huggingface_hub import snapshot_download

    load = lambda: snapshot_download(repo, revision=commit, cache_dir=str(cache), allow_patterns=names)  # noqa: E731
    folder = Path(repeated(load, PATIENT))
    for name in names:
        if not (folder / name).is_file():
            raise RunError(f"{repo}: {name} was pushed and is missing on the Hub; push again", errors.NOT_PUSHED)
        if fingerprint.sha256(folder / name) != fingerprint.sha256(staged / name):
            raise RunError(f"{repo}: {name} differs from the pushed file (another sha256); push again", errors.NOT_PUSHED)


# access


def look(settings: Hub, key: str, waits: tuple[float, ...]) -> Place:
    """The state of the repository, if this token may write to it.

    Raises:
        UserError: why it cannot be written to, and what to change; `key` is what requested the push.
    """
    repo = settings.repo_id or ""
    _check_local(repo, key)
    hub = api()
    who = with_reason(hub.whoami, repo, waits)
    user, role = who["name"], ((who.get("auth") or {}).get("accessToken") or {}).get("role") or "unknown"
    if role == "read":
        raise UserError(f"{key}: the token of {user} is read-only; create one with write permission and run `hf auth login`")
    repo = repo if "/" in repo else f"{user}/{repo}"
    private = with_reason(lambda: _private(hub, repo), repo, waits)
    if private is None:
        own = sorted({user, *(org["name"] for org in who.get("orgs") or [])})
        if repo.split("/")[0] not in own:
            expected = ", ".join(f"{name}/..." for name in own)
            raise UserError(f"hub.repo_id: {repo} does not exist, and {user} cannot create it: expected one of {expected}")
        return Place(repo, user, role, None)
    with_reason(lambda: hub.auth_check(repo, write=True), repo, waits)
    if settings.private and not private:
        raise UserError(
            f"hub.private: {repo} is public, but hub.private is true; set hub.private=false, or name another repository"
        )
    return Place(repo, user, role, private)


def _check_local(repo: str, key: str) -> None:
    """Check what is known without the Hub. Raises UserError."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"hub.repo_id: {repo}: {first_line(error)}; expected owner/name, such as me/my-model") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: {repo} cannot be reached because HF_HUB_OFFLINE is set; unset it, or {LATER}")
    if not get_token():
        raise UserError(f"{key}: no Hub token was found; run `hf auth login` or set HF_TOKEN, or {LATER}")


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
        if not _is_temporary(error):
            raise
        raise UserError(f"hub.repo_id: {repo}: the Hub cannot be reached ({first_line(error)}); wait, or {LATER}") from error


def _private(hub: Any, repo: str) -> bool | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return bool(hub.model_info(repo, timeout=30).private)
    except GatedRepoError:  # one kind of RepositoryNotFoundError
        raise
    except RepositoryNotFoundError:
        return None


def repeated(call: Callable[[], Result], waits: tuple[float, ...]) -> Result:
    """Repeat a call after temporary errors: connections, 429 and 5xx. huggingface_hub itself repeats only some requests."""
    for wait in waits:
        try:
            return call()
        except Exception as error:
            if not _is_temporary(error):
                raise
            time.sleep(max(wait, min(_retry_after(error), LONGEST_WAIT)))
    return call()


def _is_temporary(error: Exception) -> bool:
    """Whether an error is temporary."""
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
