"""Runs on other machines: a recipe as a job of Slurm, Hugging Face Jobs or SkyPilot. No torch."""

from __future__ import annotations

from difflib import get_close_matches

from hfstrat.clusters.engine import Engine
from hfstrat.clusters.hf_jobs import HfJobs
from hfstrat.clusters.skypilot import SkyPilot
from hfstrat.clusters.slurm import Slurm
from hfstrat.errors import UserError

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Slurm, HfJobs, SkyPilot)}


def engine_of(name: str | None) -> type[Engine]:
    """The engine of this name. Raises UserError with the nearest one."""
    if name in ENGINES:
        return ENGINES[name]
    if not name:
        raise UserError(f"--on: missing; expected one of {', '.join(ENGINES)}")
    near = get_close_matches(name, ENGINES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--on: {name}: unknown; {hint}expected one of {', '.join(ENGINES)}")
