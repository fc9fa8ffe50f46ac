"""Whether a repository of the Hub may be written to, in sentences; what fails in passing is asked again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hfstrat.config import Hub
from hfstrat.errors import UserError

Result = TypeVar("Result")
LATER = "set hub.push=false, and `hfstrat push RUN --repo NAME` later"
BRIEF, PATIENT = (1.0, 4.0), (2.0, 10.0, 30.0)  # seconds between attempts: before training, and for an upload
LONGEST_WAIT = 120.0  # of what a Hub that is too busy asks for


@dataclass(frozen=True)
class Place:
    """A repository that may be written to, as it was found."""

    repo: str  # with its namespace
    user: str
    role: str  # of the token
    private: bool | None  # None: it is not there yet


def look(settings: Hub, key: str, waits: tuple[float, ...]) -> Place:
    """The repository as it is, and whether this token may write to it.

    Raises:
        UserError: what is in the way, and how to go on.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo = settings.repo or ""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"hub.repo: {repo}: {first_line(error)}; expected owner/name, such as me/my-model") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: {repo} cannot be reached, for HF_HUB_OFFLINE is set; unset it, or {LATER}")
    if not get_token():
        raise UserError(f"{key}: no token of the Hub is here; run `hf auth login` or set HF_TOKEN, or {LATER}")
    hub = api()
    who = with_reason(hub.whoami, repo, waits)
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role") or "unknown"
    if role == "read":
        raise UserError(f"{key}: the token of {who['name']} may only read; make one that may write and run `hf auth login`")
    repo = repo if "/" in repo else f"{who['name']}/{repo}"
    mine = {who["name"], *(org["name"] for org in who.get("orgs") or [])}
    exists = with_reason(lambda: _private(hub, repo), repo, waits)
    if exists is None:
        if repo.split("/")[0] not in mine:
            raise UserError(
                f"hub.repo: {repo} is not there, and {who['name']} cannot make it: expected one of "
                f"{', '.join(f'{name}/...' for name in sorted(mine))}"
            )
        return Place(repo, who["name"], role, None)
    with_reason(lambda: hub.auth_check(repo, write=True), repo, waits)
    if settings.private and not exists:
        raise UserError(
            f"hub.private: {repo} is there and public, and hub.private is true; set hub.private=false, or name another"
        )
    return Place(repo, who["name"], role, exists)


def with_reason(call: Callable[[], Result], repo: str, waits: tuple[float, ...]) -> Result:
    """The same call, whose failures are sentences.

    Raises:
        UserError: the Hub says no, or does not answer.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return repeated(call, waits)
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the token is not valid; run `hf auth login`, or set HF_TOKEN",
            403: "this token may not write there; check the name, or give the token this right",
        }
        why = reasons.get(status, f"the Hub answers {status} ({first_line(error)}); wait, or {LATER}")
        raise UserError(f"hub.repo: {repo}: {why}") from error
    except Exception as error:  # the transport has many ways to fail
        if not _passes(error):
            raise
        raise UserError(f"hub.repo: {repo}: the Hub cannot be reached ({first_line(error)}); wait, or {LATER}") from error


def _private(api: Any, repo: str) -> bool | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return bool(api.model_info(repo, timeout=30).private)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def repeated(call: Callable[[], Result], waits: tuple[float, ...]) -> Result:
    """Repeat what fails in passing: connections, 429 and 5xx. The library repeats some requests itself, not all."""
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
