"""Libraries and files that a measure needs, looked for before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hfstrat.errors import UserError
from hfstrat.evaluation.section import Evaluation

LIBRARIES = {"rouge": "rouge_score", "chrf": "sacrebleu"}


def check(wanted: Evaluation) -> None:
    """Raises UserError: a library that is not installed, or a file that is not there."""
    from hfstrat.data import sources

    for metric, library in LIBRARIES.items():
        if metric in wanted.metrics:
            _installed(library, f"evaluation.metrics: {metric}")
    if wanted.lm_eval:
        _installed("lm_eval", "evaluation.lm_eval")
    for name in wanted.lm_eval:
        if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_file():
            raise UserError(f"evaluation.lm_eval: {name}: no such file; expected the name of a task, or its YAML file")
    if wanted.include_path and not Path(wanted.include_path).expanduser().is_dir():
        raise UserError(f"evaluation.include_path: {wanted.include_path}: no such folder")
    files = [("choices", file) for file in wanted.choices]
    if wanted.control not in ("auto", "off"):
        files.append(("control", wanted.control))
    for key, file in files:
        if sources.local_file(file, f"evaluation.{key}") is None:
            raise UserError(f"evaluation.{key}: {file}: no such file; expected a local file with rows")


def _installed(library: str, key: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(f"{key}: it needs {library}, which is not installed: pip install 'hfstrat[eval]'")
