"""Experiment trackers by name, through the Trainer. None by default; what can be stored on this machine is stored here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from hfstrat.errors import UserError

PACKAGES = {"trackio": "trackio", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        found = importlib.util.find_spec(PACKAGES[name])
        # wandb and others leave a folder of their own name where they ran: Python takes that for a package without a file
        if found is None or found.origin is None:
            raise UserError(f"training.report_to: {name} is not installed: pip install {PACKAGES[name]}, or remove it")


def ready(names: Sequence[str]) -> None:
    """A tracker that would ask for a login is told to work without."""
    if "wandb" in names and not os.environ.get("WANDB_API_KEY") and not _logged_in():
        os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later


def _logged_in() -> bool:
    """Whether `wandb login` left a key."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "wandb" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False
