"""What installs hfstrat on a machine that starts empty."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from hfstrat import __version__
from hfstrat.clusters.job import Job
from hfstrat.errors import UserError


def specs(job: Job) -> list[str]:
    """The packages to install, hfstrat first; a local wheel is a path.

    Raises:
        UserError: a missing wheel, or a hfstrat that was installed from a folder and cannot be installed elsewhere.
    """
    given = list(job.options.package)
    for each in given:
        if each.endswith((".whl", ".tar.gz")) and "://" not in each and not Path(each).is_file():
            raise UserError(f"--package: {each}: no such file; build it with `pip wheel --no-deps .`")
        if Path(each).is_dir():
            raise UserError(f"--package: {each} is a folder; build a wheel with `pip wheel --no-deps {each}` and give the file")
    own = [each for each in given if each.startswith("hfstrat") or "hfstrat" in Path(each).name]
    return [*(own or [_own()]), *(each for each in given if each not in own)]


def _own() -> str:
    """The hfstrat of this machine as a requirement. Raises UserError if only this machine has it."""
    try:
        origin = json.loads(metadata.distribution("hfstrat").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {"dir_info": {}}
    if not origin:
        return f"hfstrat=={__version__}"
    if "vcs_info" in origin:
        return f"hfstrat @ {origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    raise UserError(
        "--package: this hfstrat was installed from a folder or file of this machine, so the job cannot install the same; give "
        "a wheel (`pip wheel --no-deps .` in its checkout), git+https://..., or a --container that has it"
    )


def local(specs: list[str]) -> dict[str, Path]:
    """The wheels among them, which have to be copied."""
    return {each: Path(each) for each in specs if Path(each).is_file()}
