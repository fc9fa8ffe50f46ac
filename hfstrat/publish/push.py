"""Publishing on the Hugging Face Hub: asked before training, sent after it, pulled again and compared.

The result is on disk first; a failed upload never fails a run, and `hfstrat push RUN` goes on where it stopped.
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
from hfstrat.recipe.schema import Hub, Recipe
from hfstrat.tasks.report import HubCommit, Report, read, write


def check_access(recipe: Recipe) -> Place | None:
    """Find out before training whether the result can be pushed: token, its role, the name, visibility. Makes nothing.

    Raises:
        UserError: no login, no permission, another visibility, offline, or no connection.
    """
    if not recipe.hub.push or recipe.hub.repo is None or os.environ.get("RANK", "0") != "0":  # one process asks for all
        return None
    return look(recipe.hub, "hub.push", BRIEF)


def prepare(recipe: Recipe) -> list[str]:
    """Make the repository if it is missing, which tests name and rights in earnest; says what was tested.

    Raises:
        UserError: as `check_access`, or the Hub refuses to make it.
    """
    place = check_access(recipe)
    if place is None:
        return []
    if place.private is None:
        with_reason(lambda: api().create_repo(place.repo, private=recipe.hub.private, exist_ok=True), place.repo, BRIEF)
    made = "made" if place.private is None else "there, write access tested"
    private = recipe.hub.private if place.private is None else place.private
    return [
        f"hub       {place.repo} ({'private' if private else 'public'}): {made}, with the {place.role} token of {place.user}; "
        "whether there is room for the upload, the Hub does not say beforehand"
    ]


def push(recipe: Recipe, run: Path, report: Report) -> list[str]:
    """Upload the verified result of a run if its recipe asks for it; returns what to tell. Whatever fails, the run does not."""
    if not recipe.hub.push or recipe.hub.repo is None:
        return []
    try:
        return publish(run, report, recipe.hub, print)
    except Exception as error:  # whatever it is, the result is safe on disk
        return [f"not pushed       {first_line(error)}; the result is complete on disk, and `hfstrat push {run}` tries again"]


def push_run(target: str, repo: str | None, private: bool | None, revision: str | None) -> list[str]:
    """`hfstrat push RUN`: options go before what the recipe says.

    Raises:
        UserError: no finished run, no repository, no access.
        RunError: the upload failed, or the Hub gives back something else.
    """
    run = Path(target).expanduser()
    run = run.parent if run.name == "final" and not (run / "final").exists() else run
    report = read(run)
    if report is None or not (run / "final").is_dir():
        raise UserError(f"{target}: no finished run (a folder with final/ and report.json); `hfstrat train` makes one")
    hub = report.run.recipe.hub
    settings = Hub(
        push=False,
        repo=repo or hub.repo,
        private=hub.private if private is None else private,
        revision=revision or hub.revision,
    )
    if not settings.repo:
        raise UserError(f"{target}: its recipe names no hub.repo; give --repo, such as --repo me/my-model")
    try:
        return publish(run, report, settings, print)
    except RunError:
        raise
    except Exception as error:
        why = f"{settings.repo}: not pushed: {first_line(error)}; the same command goes on where it stopped"
        raise RunError(why, errors.NOT_PUSHED) from error


def publish(run: Path, report: Report, settings: Hub, say: Callable[[str], None]) -> list[str]:
    """Stage, make the repository if need be, upload, pull again into an empty cache and compare; notes it in the report."""
    hub = api()
    with tempfile.TemporaryDirectory(prefix="hfstrat-push-") as scratch:
        staged, cache = Path(scratch) / "up", Path(scratch) / "down"
        staged.mkdir()
        place = look(settings, "push", PATIENT)
        names = hub_files.stage(run, report, staged, place.repo)
        size = sum((staged / name).stat().st_size for name in names)
        say(f"pushing          {len(names)} files, {size / 1e6:.1f} MB, to {place.repo}")
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
        f"compared         {pulled} files pulled again into an empty cache: each has the same sha256",
    ]


def compare(repo: str, commit: str, staged: Path, names: list[str], cache: Path) -> int:
    """Pull a commit into an empty cache and compare hashes; how many files were the same.

    Raises:
        RunError: a file is missing or another one.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        repeated(lambda: snapshot_download(repo, revision=commit, cache_dir=str(cache), allow_patterns=names), PATIENT)
    )
    for name in names:
        if not (folder / name).is_file():
            raise RunError(f"{repo}: {name} was pushed and is not there; push again", errors.NOT_PUSHED)
        if fingerprint.sha256(folder / name) != fingerprint.sha256(staged / name):
            raise RunError(f"{repo}: {name} is not what was pushed: its sha256 differs; push again", errors.NOT_PUSHED)
    return len(names)
