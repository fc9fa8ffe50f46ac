"""Checks of generated bash scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def check_script(text: str, folder: Path) -> None:
    """By bash, and by ShellCheck where it is installed."""
    file = folder / "checked.sh"
    file.write_text(text)
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool:  # SC1090: what is sourced is on another machine
        found = subprocess.run(
            [tool, "--severity=warning", "--exclude=SC1090", str(file)], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout
