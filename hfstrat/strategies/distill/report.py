"""Comparison of the student with its teacher, and with the same student trained without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.recipe.format import plural
from hfstrat.recipe.stored import without_unset
from hfstrat.tasks import report as reports
from hfstrat.tasks.verify import LAUNCHER

if TYPE_CHECKING:
    from hfstrat.recipe.distill import Distill
    from hfstrat.recipe.load import Loaded
    from hfstrat.tasks.report import Result

KEPT = ("HFSTRAT_CACHE", "HFSTRAT_CACHE_MAX")  # our variables that the other run gets; the rest is only for this process
SMALL = 300.0  # seconds of training up to which baseline: auto runs it
ACCURACY = {"token_accuracy": "token accuracy", "accuracy": "accuracy"}  # the name of a metric in text
SAME = ("name", "teacher", "student", "shrink")  # keys that define the student
WITHOUT = {"teacher_weight": 0.0, "baseline": False}  # cross-entropy on the answers of the data alone
GENERATED = 32  # tokens that are generated to measure the speed


def compare(strategy: Distill, loaded: Loaded, result: Result, folder: Path) -> dict[str, Any]:
    """Size and speed of teacher and student, the run without the teacher if wanted, and lines for the summary."""
    measured = result.distillation.teacher.model_dump() if result.distillation and result.distillation.teacher else {}
    teacher = {**measured, **measure_teacher(strategy, loaded)}
    student = {
        **_quality(result.metrics_after),
        "parameters": result.total_parameters,
        "bytes": result.artifact_bytes,
        "tokens_per_second": speed_of(str(folder), loaded),
        "steps": result.steps,
    }
    before = _quality(result.metrics_before) if result.metrics_before else None
    without, reason = _baseline(strategy, loaded, result.train_seconds)
    found = {"teacher": teacher, "student": student, "before": before, "without_teacher": without, "no_baseline": reason}
    return {**found, "lines": lines(found)}


def _quality(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("loss", *ACCURACY, "teacher_kl") if name in metrics}


def measure_teacher(strategy: Distill, loaded: Loaded) -> dict[str, Any]:
    """The teacher's bytes on disk and tokens per second."""
    source = strategy.teacher.name_or_path if strategy.teacher else loaded.recipe.model.name_or_path
    path = Path(source).expanduser()
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else None
    if source.endswith(".gguf"):
        return {"bytes": path.stat().st_size, "tokens_per_second": None}
    section = strategy.teacher.quantization if strategy.teacher else loaded.recipe.model.quantization
    form = "recorded" if section is None else section.name
    return {"bytes": size, "tokens_per_second": speed_of(str(path) if path.is_dir() else source, loaded, form)}


def speed_of(source: str, loaded: Loaded, form: str = "recorded") -> float | None:
    """Tokens per second of greedy generation at batch size 1, after a warm-up; None for a classifier."""
    import torch

    from hfstrat.models.load import compute_dtype, source_of
    from hfstrat.tasks import artifact, generation

    options = source_of(loaded.recipe.model)
    given = {"source": options[0], **options[1], "task": loaded.recipe.task}
    model = artifact.load_artifact(source, compute_dtype(loaded.recipe.model.dtype), given, form)
    if not model.can_generate():
        return None
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    for length in (2, GENERATED):
        started = time.perf_counter()
        out = generation.continued(model, [list(range(5, 21))], None, length, min_new_tokens=length)
    return out.shape[1] / (time.perf_counter() - started)


def _baseline(strategy: Distill, loaded: Loaded, seconds: float) -> tuple[dict[str, Any] | None, str | None]:
    """The result of the same student trained without the teacher on the same data and order, or why there is none."""
    if strategy.on_policy:
        return None, "on_policy has no loss without the teacher"
    recipe = without_teacher(strategy, loaded)
    folder, by_hand = recipe.parent / "without-teacher", f"hfstrat train {recipe}"
    if strategy.baseline is False:
        return None, f"baseline: false; run it with `{by_hand}`"
    if int(os.environ.get("HFSTRAT_PROCESSES") or 1) > 1 or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return None, f"the run had several processes; run it with as many: `{by_hand}`"
    if strategy.baseline == "auto" and seconds > SMALL:
        return None, f"training took {seconds:.0f} s; set baseline: true, or run it with `{by_hand}`"
    command = [sys.executable, "-m", "hfstrat.train", str(recipe), "--overwrite"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER) or key in KEPT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = reports.read(folder) if not done.returncode else None
    if report is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return None, f"the run without the teacher failed: {reason}"
    result = report.finished
    return {**_quality(result.metrics_after), "steps": result.steps, "seconds": result.train_seconds}, None


def without_teacher(strategy: Distill, loaded: Loaded) -> Path:
    """Write the recipe of that run next to the result; returns its path."""
    folder = Path(loaded.recipe.output_dir).expanduser()
    whole, given = without_unset(loaded.recipe.model_dump()), strategy.model_dump(exclude_unset=True)
    whole["strategy"] = {**without_unset({key: given[key] for key in SAME if key in given}), **WITHOUT}
    whole["output_dir"] = str(folder / "without-teacher")
    whole["hub"] = {"push_to_hub": False}  # its result is not published
    whole["training"] = {**whole["training"], "resume_from_checkpoint": "never"}
    file = folder / "without-teacher.yaml"
    file.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return file


def lines(found: dict[str, Any]) -> list[str]:
    """Lines for the summary: quality, size and speed of both models, and whether the teacher helped."""
    teacher, student, without = found["teacher"], found["student"], found["without_teacher"]
    key, words = next((name, label) for name, label in ACCURACY.items() if name in teacher)
    text = [
        f"{who:<16} loss {one['loss']:.4f}, {words} {one[key]:.1%}; {_shape(one)}"
        for who, one in (("teacher", teacher), ("student", student))
    ]
    share = f"{student[key] / teacher[key]:.1%}" if teacher[key] else "more"
    smaller = 1 - student["parameters"] / teacher["parameters"]
    size = f"{smaller:.0%} smaller" if smaller > 0.005 else "the same size" if smaller > -0.005 else f"{-smaller:.0%} larger"
    text.append(f"distilled        {share} of the teacher's {words}, {size}")
    if without:
        gain = without["loss"] - student["loss"]
        helped = "the teacher helped" if gain > 0 else "the teacher did NOT help"
        text.append(
            f"without teacher  loss {without['loss']:.4f}, {words} {without[key]:.1%} after {_length(student, without)}: "
            f"{helped} ({-gain:+.4f})"
        )
    else:
        text.append(f"without teacher  not run: {found['no_baseline']}")
    return text


def _length(student: dict[str, Any], without: dict[str, Any]) -> str:
    """The lengths of both runs: with max_time a run without a teacher makes more steps."""
    if without["steps"] == student["steps"]:
        return "as many steps"
    return f"{plural(without['steps'], 'step')} (with it {student['steps']:,}; both ended by the clock or early stopping)"


def _shape(one: dict[str, Any]) -> str:
    size = f", {one['bytes'] / 1e6:,.1f} MB" if one.get("bytes") else ""
    speed = f", {one['tokens_per_second']:,.1f} tokens/s" if one.get("tokens_per_second") else ""
    return f"{one['parameters'] / 1e6:,.2f} M parameters{size}{speed}"
