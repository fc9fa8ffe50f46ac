"""Waiting OpenMP threads spin for a short time only, in every process that runs hfstrat."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LIBGOMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")


def shown(code: str, **settings: str) -> str:
    """What the OpenMP library prints about its settings when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **settings}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
@pytest.mark.skipif(not LIBGOMP.is_file(), reason="this torch brings no libgomp")
def test_the_library_reads_the_short_spin() -> None:
    assert "GOMP_SPINCOUNT = '3000'" in shown("import hfstrat.train, torch")
    assert "GOMP_SPINCOUNT = '3000'" not in shown("import torch")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_the_user_stays(setting: str) -> None:
    code = f"import os, sys, hfstrat; print({{name: os.environ.get(name) for name in {SETTINGS}}}, file=sys.stderr)"
    value = "passive" if setting == "OMP_WAIT_POLICY" else "7"
    assert shown(code, **{setting: value}).strip().endswith(str(dict.fromkeys(SETTINGS) | {setting: value}))
