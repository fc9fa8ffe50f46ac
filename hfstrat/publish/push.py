"""Pushing a result to the Hugging Face Hub: access is checked before training; after it, files are uploaded and verified.

The result is on disk first, so a failed upload never fails a run; `hfstrat push RUN` resumes it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from hfstrat import errors
from hfstrat.errors import RunError, UserError
from hfstrat.models import fingerprint
from hfstrat.publish import hub_files
from hfstrat.publish.hub_files import BRIEF, PATIENT, Place, api, first_line, look, repeated, with_reason
from hfstrat.recipe import format
from hfstrat.recipe.schema import Hub, Recipe
from hfstrat.tasks.report import HubCommit, Report, read, write


def check_access(recipe: Recipe) -> Place | None:
    """Check before training whether the result can be pushed: token, role, name, visibility. Creates nothing.

    Raises:
        UserError: no login, no permission, a different visibility, offline, or no connection.
    """
    if (
        not recipe.hub.push_to_hub or recipe.hub.repo_id is None or os.environ.get("RANK", "0") != "0"
    ):  # the first process checks for all
        return None
    return look(recipe.hub, "hub.push_to_hub", BRIEF)


def prepare(recipe: Recipe) -> list[str]:
    """Create the repository if it does not exist, which is the real test of name and permission; returns lines to print.

    Raises:
        UserError: as `check_access`, or the Hub refuses to create it.
    """
    place = check_access(recipe)
    if place is None:
        return []
    if place.private is None:
        with_reason(lambda: api().create_repo(place.repo, private=recipe.hub.private, exist_ok=True), place.repo, BRIEF)
    state = "created" if place.private is None else "exists, write access checked"
    private = recipe.hub.private if place.private is None else place.private
    return [
        f"hub       {place.repo} ({'private' if private else 'public'}): {state} with the {place.role} token of {place.user}; "
        "the Hub does not report in advance whether the upload fits the storage quota"
    ]


def push(recipe: Recipe, run: Path, report: Report) -> list[str]:
    """Upload the verified result of a run if its recipe says so; returns lines to print. No error here fails the run."""
    if not recipe.hub.push_to_hub or recipe.hub.repo_id is None:
        return []
    try:
        return publish(run, report, recipe.hub, print)
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
    hub = report.run.recipe.hub
    settings = Hub(
        push_to_hub=False,
        repo_id=repo or hub.repo_id,
        private=hub.private if private is None else private,
        revision=revision or hub.revision,
    )
    if not settings.repo_id:
        raise UserError(f"{target}: its recipe has no hub.repo_id; give one with --repo, such as --repo me/my-model")
    try:
        return publish(run, report, settings, print)
    except RunError:
        raise
    except Exception as error:
        why = f"{settings.repo_id}: not pushed: {first_line(error)}; the same command resumes the upload"
        raise RunError(why, errors.NOT_PUSHED) from error


def publish(run: Path, report: Report, settings: Hub, say: Callable[[str], None]) -> list[str]:
    """Create the repository if needed, upload, download into an empty cache, compare; adds the commit to the report."""
    hub = api()
    with tempfile.TemporaryDirectory(prefix="hfstrat-push-") as scratch:
        staged, cache = Path(scratch) / "up", Path(scratch) / "down"
        staged.mkdir()
        place = look(settings, "push", PATIENT)
        names = hub_files.stage(run, report, staged, place.repo)
        size = sum((staged / name).stat().st_size for name in names)
        say(f"pushing          {len(names)} files, {format.file_size(size)}, to {place.repo}")
        repeated(lambda: hub.create_repo(place.repo, private=settings.private, exist_ok=True), PATIENT)
        if settings.revision and settings.revision != "main":
            repeated(lambda: hub.create_branch(place.repo, branch=settings.revision, exist_ok=True), PATIENT)
        commit = repeated(
            lambda: hub.upload_folder(
                repo_id=place.repo,
                folder_path=staged,
                revision=settings.revision,
                commit_message="hfstrat: trained and verified",
                delete_patterns=list(hub_files.STALE),
            ),
            PATIENT,
        )
        pushed = HubCommit(repo=place.repo, revision=settings.revision, commit=commit.oid)
        report.finished.hub = pushed
        write(report, run)
        pulled = compare(place.repo, commit.oid, staged, names, cache)
    pushed.compared = True
    write(report, run)
    branch = f" on {settings.revision}" if settings.revision else ""
    return [
        f"pushed           {hub.endpoint}/{place.repo}{branch}, commit {commit.oid[:12]}",
        f"compared         {pulled} files were downloaded again into an empty cache: each has the same sha256",
    ]


def compare(repo: str, commit: str, staged: Path, names: list[str], cache: Path) -> int:
    """Download a commit into an empty cache and compare hashes; returns the number of files.

    Raises:
        RunError: a file is missing or differs.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        repeated(lambda: snapshot_download(repo, revision=commit, cache_dir=str(cache), allow_patterns=names), PATIENT)
    )
    for name in names:
        if not (folder / name).is_file():
            raise RunError(f"{repo}: {name} was pushed and is missing on the Hub; push again", errors.NOT_PUSHED)
        if fingerprint.sha256(folder / name) != fingerprint.sha256(staged / name):
            raise RunError(f"{repo}: {name} differs from the pushed file (another sha256); push again", errors.NOT_PUSHED)
    return len(names)
