"""report.json: what ran, on what, how long, how much memory, how good."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from hfstrat.errors import NAMES, RunError
from hfstrat.evaluation import table
from hfstrat.models.fingerprint import environment
from hfstrat.recipe.load import Loaded
from hfstrat.tasks import TASKS


def make(loaded: Loaded, result: dict[str, Any], account: dict[str, Any]) -> dict[str, Any]:
    """The whole report: `run`, `result`, `environment`."""
    recipe = loaded.recipe
    named = [Path(source.path).expanduser() for source in (*recipe.data.train, *(recipe.data.eval or []))]
    files = [path for path in named if path.is_file()]
    return {
        "run": {**_run(loaded), "data": account},
        "result": result,
        "environment": environment(recipe.model.name_or_path, recipe.model.revision, files),
    }


def write_failure(loaded: Loaded, folder: Path, error: RunError) -> None:
    """A report of how a run ended that did not come to its end."""
    with contextlib.suppress(OSError):  # the disk may be what failed
        write({"run": _run(loaded), "result": {"status": NAMES[error.code], "message": str(error)}}, folder)


def _run(loaded: Loaded) -> dict[str, Any]:
    return {
        "recipe": loaded.recipe.model_dump(),
        "source": loaded.source,
        "origins": {".".join(path): origin for path, origin in sorted(loaded.origins.items())},
    }


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json in one move, so that it is whole or not there."""
    file = folder / "report.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for a person."""
    run, result = report["run"], report["result"]
    before, after = result["metrics_before"], result["metrics_after"]
    task = TASKS[run["recipe"].get("task", "causal-lm")]
    lines = []
    if before:
        gain = before["loss"] - after["loss"]
        lines.append(
            f"evaluation loss  {before['loss']:.4f} before, {after['loss']:.4f} after ({-gain:+.4f}); "
            f"{task.text.change(before, after)}"
        )
    else:
        lines.append(f"evaluation       {task.text.metrics(after)} after")
    lines += task.text.details(result.get("evaluation", {}))
    if "bits_per_byte" in after:
        earlier = f"{before['bits_per_byte']:.3f} before, " if before else ""
        lines.append(f"bits per byte    {earlier}{after['bits_per_byte']:.3f} after")
    lines += table.lines(result.get("measured", {}))
    if bars := result.get("bars"):
        start = f"start loss {before['loss']:.3f} against ln V = {bars['uniform']:.3f}; " if before else ""
        margin, each = bars["unigram"] - after["loss"], bars["epoch_tokens"] * bars["epochs"] / bars["parameters"]
        lines.append(
            f"bars             {start}{after['loss']:.3f} after is {abs(margin):.3f} nats/token "
            f"{'under' if margin > 0 else 'ABOVE'} the unigram bar of {bars['unigram']:.3f}; "
            f"{each:.2g} tokens a parameter in {bars['epochs']:.1f} epochs"
        )
    lines.append(
        f"learnt           {result['trainable_parameters']:,} of {result['total_parameters']:,} parameters "
        f"({result['trainable_parameters'] / result['total_parameters']:.2%}), strategy {run['recipe']['strategy']['name']}"
    )
    lines.append(
        f"cost             {result['train_seconds']:.0f} s training at {result['tokens_per_second']:,.0f} real tokens/s, "
        f"{result['total_seconds']:.0f} s in all, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if held := result.get("quantization"):
        lines.append(
            f"quantized        {held['share']:.1%} of the base in {held['name']}: its weights take "
            f"{held['weight_bytes'] / 1e6:,.0f} MB ({held['parameters'] * 2 / 1e6:,.0f} in 16 bits)"
        )
    lines += result.get("comparison", {}).get("lines", [])
    check = result["verified"]
    same = "bit for bit" if check["bit_equal"] else f"within {check['max_difference']:.2g}"
    other = f" on the {check['device']}" if check.get("device") != check.get("trained_on") else ""  # a GPU without room for it
    lines.append(f"verified         loaded by {check['loaded_with']} in a fresh process{other}: the same logits {same}")
    return lines
