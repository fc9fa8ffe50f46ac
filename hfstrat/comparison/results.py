"""The results of a comparison: intervals over seeds and examples, and one dict for comparison.json, table and page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from hfstrat import errors
from hfstrat.comparison.processes import DataFacts, Ending, Run
from hfstrat.engine.entries import Entry
from hfstrat.evaluation import intervals
from hfstrat.objectives import task_of
from hfstrat.recipe.load import Loaded
from hfstrat.recipe.schema import Recipe
from hfstrat.strategies import defaults
from hfstrat.strategies.defaults import Prediction
from hfstrat.tasks.base import Quality
from hfstrat.tasks.report import Report, Result, read

LEVEL = 0.95
RESAMPLES = 2000
MOST = 500.0  # reach of an interval on a logarithmic scale, beyond which exp would overflow
AT_ONCE = 4_000_000  # resampling weights in memory at a time
SEED = 0  # of the resampling: the same measurements always give the same intervals
IN_BYTES = Quality("bits_per_byte", False, "bits", "bytes")  # for several tokenizers, whose losses per token differ
MEASURES = ("seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters", "total_parameters", "artifact_bytes")
FROM_REPORT = (*MEASURES[1:], "steps", "tokens", "setup_seconds", "train_seconds", "total_seconds")
WAITING, RUNNING = "waiting", "running"
Predict = Callable[[dict[str, Loaded]], Mapping[str, Prediction]]
"""Predictions for loaded recipes (with their budget) by name; a recipe that cannot be predicted is left out."""


class Interval(NamedTuple):
    low: float
    high: float


def over_seeds(values: Sequence[float], examples: int | None = None) -> Interval | None:
    """The 95 % confidence interval of the mean over seeds; None for fewer than two.

    Student's t on a scale where it cannot leave the range of the metric: the logit of a share, with half an example added to
    both sides (Haldane 1956), and the logarithm of a positive number. Other metrics keep their own scale.

    Args:
        values: of the metric, one for each seed.
        examples: of how many examples the values are shares; None: they are not shares.
    """
    count, scaled = len(values), np.asarray(values, dtype=np.float64)
    if count < 2:
        return None
    if examples is not None:
        shares = (scaled * examples + 0.5) / (examples + 1)
        low, high = _t_interval(np.log(shares / (1 - shares)))
        back = [((1 / (1 + math.exp(-bound))) * (examples + 1) - 0.5) / examples for bound in (low, high)]
        return Interval(*(min(1.0, max(0.0, bound)) for bound in back))
    if (scaled > 0).all():
        low, high = _t_interval(np.log(scaled))
        return Interval(math.exp(low), math.exp(high))
    return Interval(*_t_interval(scaled))


def _t_interval(values: np.ndarray) -> tuple[float, float]:
    from scipy.special import stdtrit

    middle, spread = float(values.mean()), float(values.std(ddof=1))
    reach = min(MOST, float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(len(values)))
    return middle - reach, middle + reach


def ratio(above: np.ndarray, below: np.ndarray) -> float:
    """The metric over all examples, averaged over seeds; both arguments are `[seeds, examples]`."""
    return float((above.sum(1) / below.sum(1)).mean())


def resampled(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, np.ndarray]:
    """The metric on examples drawn with replacement, the same draws for every name: `[resamples]` each.

    Args:
        parts: by name, numerator and denominator of the metric, `[seeds, examples]` each, examples in the same order.
        resamples: number of draws.
        seed: of the draws.
    """
    rows = next(iter(parts.values()))[0].shape[1]
    random = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    block = max(1, AT_ONCE // max(rows, 1))
    for start in range(0, resamples, block):
        weights = random.multinomial(rows, np.full(rows, 1 / rows), size=min(block, resamples - start)).astype(np.float64)
        for name, (above, below) in parts.items():
            with np.errstate(invalid="ignore", divide="ignore"):  # all drawn examples may be without a single item
                found[name].append(((weights @ above.T) / (weights @ below.T)).mean(1))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def interval(draws: np.ndarray) -> Interval:
    """The middle 95 % of the draws."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def front(points: dict[str, tuple[float, float]], higher_is_better: bool) -> set[str]:
    """The names on the Pareto front: no other is at least as good and cheaper, or better at no higher cost.

    Args:
        points: quality and cost by name.
        higher_is_better: of the quality.
    """
    sign = -1.0 if higher_is_better else 1.0
    costs = {name: (sign * quality, price) for name, (quality, price) in points.items()}
    return {
        name
        for name, (worse, dear) in costs.items()
        if not any(a <= worse and b <= dear and (a < worse or b < dear) for a, b in costs.values())
    }


def quality_of(recipe: Recipe, tokenizers: int) -> Quality:
    """The metric that is compared: that of task and objective, or bits per byte for losses of several tokenizers."""
    metrics = task_of(recipe).metrics
    return IN_BYTES if tokenizers > 1 and metrics.of_tokens else metrics.quality


def run_row(run: Run, ending: Ending | None, quality: Quality) -> dict[str, Any]:
    """One run: its ending and, if it finished, its measurements."""
    found: dict[str, Any] = {"seed": run.seed, "status": WAITING, "folder": str(run.folder), "command": run.command()}
    if ending is None:
        return found
    found |= {"status": ending.status, "sentence": ending.sentence, "wall_seconds": ending.wall_seconds}
    if not ending.is_done:
        return found
    result = report_of(run).finished
    start, before, after = result.setup_seconds, result.metrics_before or {}, result.metrics_after
    scale = after[quality.metric] / after["loss"] if quality is IN_BYTES and after["loss"] else 1.0
    return {
        **found,
        **{name: value for name in FROM_REPORT if (value := getattr(result, name)) is not None},
        "seconds": start + result.train_seconds,
        "before": before.get(quality.metric),
        "quality": after.get(quality.metric),
        "metrics": after,
        "curve": [
            {"seconds": start + each.seconds, "tokens": each.tokens, "step": each.step, "loss": scale * each.eval_loss}
            for each in result.curve
        ],
    }


def report_of(run: Run) -> Report:
    """The report of a finished run."""
    report = read(run.result)
    assert report is not None, "checked when its ending was read"
    return report


def entry_row(entry: Entry, its_runs: list[dict[str, Any]], predicted: Prediction | None, quality: Quality) -> dict[str, Any]:
    """One recipe: means over its finished runs."""
    done = [run for run in its_runs if run["status"] == errors.NAMES[errors.OK]]
    values = [run["quality"] for run in done if run["quality"] is not None]
    is_share = quality.metric in task_of(entry.loaded.recipe).metrics.shares
    spread = over_seeds(values, round(done[0]["metrics"].get("rows", 0)) or None if is_share and done else None)
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
        "factors": defaults.factors(entry.strategy)._asdict(),
        "runs": its_runs,
    }


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def compare_entries(
    rows: list[dict[str, Any]], parts: Mapping[str, Any], quality: Quality
) -> tuple[str | None, list[dict[str, Any]]]:
    """Add intervals over examples, differences from the best, and Pareto fronts to the rows.

    Args:
        rows: as `entry_row` gives them.
        parts: by label, numerators and denominators of `quality`, `[seeds, examples]` each (see `aligned`); those of baselines
            too.
        quality: the metric.

    Returns:
        The best label, and the baselines with their quality, interval and difference from the best.
    """
    found = {row["label"]: row for row in rows if row["quality"] is not None}
    if not found:
        return None, []
    better = max if quality.higher_is_better else min
    best: str = better(found.values(), key=lambda row: row["quality"])["label"]
    draws = resampled(dict(parts)) if parts else {}
    for label, row in found.items():
        row["over_rows"] = list(interval(draws[label])) if label in draws else None
        row["against_best"] = against(label, best, draws, parts) if label != best and {label, best} <= draws.keys() else None
    for cost, name in (("seconds", "seconds"), ("memory", "peak_memory_bytes")):
        points = {label: (row["quality"], row[name]) for label, row in found.items() if row[name] is not None}
        on = front(points, quality.higher_is_better)
        for row in rows:
            row.setdefault("front", {})[cost] = row["label"] in on
    return best, [
        _baseline(name, found, draws, parts) for name in parts if name.startswith(intervals.BASELINE) and name not in found
    ]


def _baseline(name: str, found: Mapping[str, Any], draws: Mapping[str, np.ndarray], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The quality of a baseline, and the difference of each recipe from it."""
    return {
        "name": name.removeprefix(intervals.BASELINE),
        "quality": ratio(*parts[name]),
        "over_rows": list(interval(draws[name])),
        "differences": {label: against(label, name, draws, parts) for label in found if label in draws},
    }


def against(label: str, best: str, draws: Mapping[str, np.ndarray], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The difference from another, such as the best, on the same examples; it is significant if its interval excludes zero."""
    low, high = interval(draws[label] - draws[best])
    difference = ratio(*parts[label]) - ratio(*parts[best])
    return {"difference": difference, "low": low, "high": high, "significant": low > 0 or high < 0}


def aligned(entries: Mapping[str, list[Run]], quality: Quality) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scores of each finished run by label, `[seeds, examples]`, on the examples that all runs have; and those of the
    baselines that the first of them measured, whose names begin with `intervals.BASELINE`.

    An entry without stored scores is left out.
    """
    read = {
        label: [columns for run in of if {quality.above, quality.below} <= (columns := intervals.read_rows(run.result)).keys()]
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
    columns = next((of[0] for of in read.values() if any(name.startswith(intervals.BASELINE) for name in of[0])), {})
    for name in (name for name in columns if name.startswith(intervals.BASELINE)):
        at = np.searchsorted(columns["row"], shared)
        made.setdefault(name, (columns[name][at][None], columns[quality.below][at][None].astype(np.float64)))
    return made if len(shared) else {}


def samples(finished: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The sample prompts, with the answers of each recipe after training."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for label, result in finished.items():
        for answer in result.answers:
            row = by_prompt.setdefault(answer.prompt, {"prompt": answer.prompt, "reference": answer.reference, "after": {}})
            row.setdefault("before", answer.before)
            row["after"][label] = answer.after
    return list(by_prompt.values())


def confusions(finished: Mapping[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """The confusion matrix of each recipe, summed over seeds; empty if the task has none."""
    found = {}
    for label, several in finished.items():
        details = [result.evaluation for result in several if result.evaluation]
        counts = [each.confusion.counts for each in details if each.confusion]
        if counts:
            names = [row.label for row in details[0].labels]
            found[label] = {"labels": names, "counts": np.sum(counts, axis=0).tolist()}
    return found


def data_row(facts: Mapping[str, DataFacts]) -> dict[str, Any]:
    """The data that all recipes share."""
    first = asdict(next(iter(facts.values())))
    return {name: first[name] for name in ("train_rows", "train_tokens", "eval_rows", "evaluated")}
