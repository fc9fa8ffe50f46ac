"""What the runs of a comparison came to: one dict that comparison.json, the table and the page are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hfstrat import errors, evaluation_rows, factors
from hfstrat.comparison import runs, statistics
from hfstrat.comparison.entries import Entry
from hfstrat.comparison.predicted import Prediction
from hfstrat.comparison.runs import Ending, Run
from hfstrat.comparison.survey import Rows
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Quality

IN_BYTES = Quality("bits_per_byte", False, "bits", "bytes")  # where tokenizers differ, losses are of other tokens
MEASURES = ("seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters", "total_parameters", "artefact_bytes")
FROM_REPORT = (*MEASURES[1:], "steps", "tokens", "setup_seconds", "train_seconds", "total_seconds")
WAITING, RUNNING = "waiting", "running"


def quality_of(task: str, tokenizers: int) -> Quality:
    """What is compared: the task's own measure, or bits a byte for models of several tokenizers."""
    return IN_BYTES if tokenizers > 1 and TASKS[task].unit == "token" else TASKS[task].quality


def of_run(run: Run, ending: Ending | None, quality: Quality) -> dict[str, Any]:
    """One run: how it ended and, of a finished one, what was measured."""
    found: dict[str, Any] = {"seed": run.seed, "status": WAITING, "folder": str(run.folder), "command": run.command()}
    if ending is None:
        return found
    found |= {"status": ending.status, "sentence": ending.sentence, "wall_seconds": ending.wall_seconds}
    if not ending.is_done:
        return found
    report = runs.report_of(run)
    result = report["result"]
    found |= {name: result[name] for name in FROM_REPORT if name in result}
    found["seconds"] = result.get("setup_seconds", 0.0) + result["train_seconds"]
    for when, metrics in (("before", result["metrics_before"]), ("quality", result["metrics_after"])):
        found[when] = (metrics or {}).get(quality.metric)
    found["metrics"] = result["metrics_after"]
    start, after = result.get("setup_seconds", 0.0), result["metrics_after"]
    scale = after[quality.metric] / after["loss"] if quality is IN_BYTES and after["loss"] else 1.0
    found["curve"] = [
        {
            "seconds": start + point["seconds"],
            "tokens": point["tokens"],
            "step": point["step"],
            "loss": scale * point["eval_loss"],
        }
        for point in result.get("curve", [])
    ]
    return found


def of_entry(entry: Entry, its_runs: list[dict[str, Any]], predicted: Prediction | None) -> dict[str, Any]:
    """One row of the table: means over the seeds that came to their end."""
    done = [run for run in its_runs if run["status"] == errors.NAMES[errors.OK]]
    values = [run["quality"] for run in done if run["quality"] is not None]
    spread = statistics.over_seeds(values)
    failed = next((run for run in its_runs if run["status"] not in (errors.NAMES[errors.OK], WAITING, RUNNING)), None)
    return {
        "label": entry.label,
        "strategy": entry.strategy,
        "recipe": entry.source,
        "model": entry.loaded.recipe.model.name_or_path or "(new)",
        "status": failed["status"] if failed else "done" if len(done) == len(its_runs) else WAITING,
        "sentence": failed["sentence"] if failed else "",
        "finished": len(done),
        "quality": mean(values),
        "over_seeds": list(spread) if spread else None,
        "before": mean([run["before"] for run in done if run["before"] is not None]),
        **{name: mean([run[name] for run in done if run.get(name) is not None]) for name in MEASURES},
        "predicted": dict(predicted or {}),
        "factors": factors.of(entry.strategy)._asdict(),
        "runs": its_runs,
    }


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def put_side_by_side(rows: list[dict[str, Any]], parts: Mapping[str, Any], quality: Quality) -> dict[str, Any]:
    """Intervals over examples, distances from the best, and the fronts, written into the rows.

    Args:
        parts: by label, numerators and denominators of `quality`, `[seeds, rows]` each (see `aligned`).
    """
    found = {row["label"]: row for row in rows if row["quality"] is not None}
    if not found:
        return {"best": None}
    better = max if quality.higher_is_better else min
    best = better(found.values(), key=lambda row: row["quality"])["label"]
    draws = statistics.resampled(dict(parts)) if parts else {}
    for label, row in found.items():
        row["over_rows"] = list(statistics.interval(draws[label])) if label in draws else None
        row["against_best"] = against(label, best, draws, parts) if label != best and {label, best} <= draws.keys() else None
    for price, name in (("seconds", "seconds"), ("memory", "peak_memory_bytes")):
        points = {label: (row["quality"], row[name]) for label, row in found.items() if row[name] is not None}
        on = statistics.front(points, quality.higher_is_better)
        for row in rows:
            row.setdefault("front", {})[price] = row["label"] in on
    return {"best": best}


def against(label: str, best: str, draws: Mapping[str, np.ndarray], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The difference from the best on the same rows, and whether its interval leaves out nought."""
    low, high = statistics.interval(draws[label] - draws[best])
    difference = statistics.ratio(*parts[label]) - statistics.ratio(*parts[best])
    return {"difference": difference, "low": low, "high": high, "told_apart": low > 0 or high < 0}


def aligned(entries: Mapping[str, list[Run]], quality: Quality) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each finished run said of each evaluation row: by label `[seeds, rows]`, of rows that all of them have.

    An entry without such files is left out.
    """
    read = {
        label: [columns for run in of if {quality.above, quality.below} <= (columns := evaluation_rows.read(run.result)).keys()]
        for label, of in entries.items()
    }
    read = {label: of for label, of in read.items() if of}
    every = [columns["row"] for of in read.values() for columns in of]
    if not every:
        return {}
    shared = every[0]
    for rows in every[1:]:
        shared = np.intersect1d(shared, rows)
    made = {}
    for label, of in read.items():
        places = [np.searchsorted(columns["row"], shared) for columns in of]
        above, below = (
            np.stack([c[name][p] for c, p in zip(of, places, strict=True)]) for name in (quality.above, quality.below)
        )
        made[label] = (above.astype(np.float64), below.astype(np.float64))
    return made if len(shared) else {}


def samples(reports: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompts that all were asked, with what each said after training."""
    asked: dict[str, dict[str, Any]] = {}
    for label, report in reports.items():
        for answer in report.get("result", {}).get("answers", []):
            row = asked.setdefault(
                answer["prompt"], {"prompt": answer["prompt"], "reference": answer.get("reference", ""), "after": {}}
            )
            row.setdefault("before", answer.get("before", ""))
            row["after"][label] = answer["after"]
    return list(asked.values())


def confusions(reports: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By label the confusion matrix summed over seeds, with the names; nothing where there is none."""
    found = {}
    for label, several in reports.items():
        details = [report["result"].get("evaluation") or {} for report in several]
        counts = [each["confusion"]["counts"] for each in details if "confusion" in each]
        if counts:
            names = [row["label"] for row in details[0]["labels"]]
            found[label] = {"labels": names, "counts": np.sum(counts, axis=0).tolist()}
    return found


def rows_facts(rows: Mapping[str, Rows]) -> dict[str, Any]:
    first = asdict(next(iter(rows.values())))
    return {name: first[name] for name in ("train_rows", "train_tokens", "eval_rows", "evaluated")}
