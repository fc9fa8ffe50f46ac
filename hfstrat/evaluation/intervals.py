"""Confidence intervals of metrics by the bootstrap over examples, paired when two models are measured on the same examples.

Examples, not tokens, are resampled: the tokens of an example are correlated (Miller 2024, arXiv 2411.00640, on clustered
errors). The interval is the percentile interval (Efron and Tibshirani 1993, chapter 13). The difference of two models is
resampled with the same examples for both (Koehn 2004, W04-3250), which is much narrower than two separate intervals. If each
example is either right or wrong, the interval of a share is Wilson's (1927), which is informative even if all examples are
right. Numpy only: `compare` uses this module without torch.

Not scipy.stats.bootstrap: it resamples values, and here one resample serves all metrics of both models.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.tasks.base import Score, Task, ratios

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData

ROWS, ANSWERS, CONTROL = "evaluation rows", "answers", "control text"  # what is measured, by its name in reports

LEVEL = 0.95
Z = 1.959963984540054  # standard normal, at (1 + LEVEL) / 2
RESAMPLES, MIN_RESAMPLES = 1000, 200
FEWEST = 10  # examples; of fewer, resamples repeat each other, and the interval of three equal differences has no width
MAX_DRAWS = 2 * 10**8  # examples drawn in total; more examples get fewer resamples
SEED = 20240401
METHOD = (
    "95%: percentile bootstrap over examples, 1000 resamples (Efron and Tibshirani 1993); differences paired by example "
    "(Koehn 2004); shares of correct examples by Wilson's score interval (1927)"
)


@dataclass(frozen=True)
class Measurement:
    """The scores of one model on one set of examples."""

    rows: int  # the number of examples
    score: Score  # computes the metrics from the weight of each example
    shares: tuple[str, ...] = ()  # names of metrics that are a share of correct examples
    counts: dict[str, float] = field(default_factory=dict)  # numbers without an interval, such as tokens
    details: dict[str, Any] = field(default_factory=dict)  # for the report
    # metrics with an interval that was computed elsewhere: value, low, high
    given: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    order: str = ""  # a digest of the examples and their order; only measurements with equal digests are paired
    kept: tuple[dict[str, float], ...] | None = None  # the resampled metrics, where the scores of single examples are gone

    @cached_property
    def samples(self) -> tuple[dict[str, float], ...]:
        """The metrics of each resample of the examples."""
        return tuple(self.score(weights) for weights in draws(self.rows)) if self.kept is None else self.kept

    def values(self) -> dict[str, float]:
        """The metrics by name."""
        return {**self.score(np.ones(self.rows)), **{name: value for name, (value, _, _) in self.given.items()}}


def means(columns: dict[str, np.ndarray]) -> Score:
    """A score that is the mean of each column over the examples."""
    if not columns:
        return lambda weights: {}
    score = ratios(columns, {name: itemgetter(name) for name in columns})
    return lambda weights: {name: total / weights.sum() for name, total in score(weights).items()}


def of_columns(found: dict[str, dict[str, np.ndarray]]) -> dict[str, Measurement]:
    """Measurements that are means of columns with a number for each example, `[n]`, by their names."""
    return {name: Measurement(len(next(iter(columns.values()))), means(columns)) for name, columns in found.items()}


def draws(rows: int) -> Iterator[np.ndarray]:
    """The weight of each example in each resample, `[rows]`: the same for equal numbers of examples, none below `FEWEST`."""
    source = np.random.default_rng((SEED, rows))
    for _ in range(max(MIN_RESAMPLES, min(RESAMPLES, MAX_DRAWS // rows)) if rows >= FEWEST else 0):
        yield np.bincount(source.integers(0, rows, rows), minlength=rows).astype(np.float64)


def with_intervals(before: Measurement | None, after: Measurement) -> dict[str, Any]:
    """The entry of the report: value and interval of each metric `before` and `after`, and of their difference.

    The difference has no interval if the examples are not the same.
    """
    found = {"before": before, "after": after} if before is not None else {"after": after}
    report: dict[str, Any] = {"rows": after.rows, **after.counts}
    report |= {name: _single(one) for name, one in found.items()}
    if before is not None:
        paired = before.rows == after.rows and before.order == after.order
        both = zip(before.samples, after.samples, strict=True) if paired and before.samples else ()
        differences = [{name: b[name] - a[name] for name in b if name in a} for a, b in both]
        old, new = before.values(), after.values()
        report["difference"] = {n: entry(new[n] - old[n], *between(differences, n)) for n in new if n in old}
    return report | ({"details": after.details} if after.details else {})


def _single(found: Measurement) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in found.score(np.ones(found.rows)).items():
        low, high = wilson(value, found.rows) if name in found.shares else between(found.samples, name)
        entries[name] = entry(value, low, high)
    return entries | {name: entry(*three) for name, three in found.given.items()}


def entry(value: float, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def between(samples: Sequence[dict[str, float]], name: str) -> tuple[float | None, float | None]:
    """The central 95% of the resampled values of a metric; None without values or with values that are not finite."""
    values = [each[name] for each in samples if name in each]
    if not values or not all(map(math.isfinite, values)):
        return None, None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Wilson's score interval of a share of `rows` examples."""
    middle = share + Z * Z / (2 * rows)
    half = Z * math.sqrt(share * (1 - share) / rows + Z * Z / (4 * rows * rows))
    size = 1 + Z * Z / rows
    return max(0.0, (middle - half) / size), min(1.0, (middle + half) / size)


# the scores of each example in a file next to a run's report, so that two runs can be compared example by example

ROWS_FILE = "evaluation_rows.npz"
BASELINE = "baseline "  # begins the names of the columns of baselines
Columns = dict[str, np.ndarray]


def write_rows(folder: Path, data: PreparedData, columns: Columns, of_tokens: bool) -> None:
    """Write the columns (`[examples]` each) with the index of each example in its source.

    The file also holds the number of `bytes` behind the supervised tokens, if the loss is per token (`of_tokens`) and the
    tokenizer determines it exactly. Nothing is
    written if the columns belong to other examples, as after training with another library's trainer.
    """
    if len(columns["nll"]) != len(data.eval):
        return
    stored = {"row": np.asarray(data.eval["row"][:], dtype=np.int64), **columns}
    if of_tokens and (sizes := supervised_bytes(data)) is not None:
        stored["bytes"] = sizes
    np.savez_compressed(folder / ROWS_FILE, **stored)  # type: ignore[arg-type]


def measurement_of(task: Task, sums: tuple[np.ndarray, ...], data: PreparedData) -> Measurement:
    """The task's metrics from what `Metrics.sums` gives for each example of `data.eval`, in its order."""
    metrics = task.metrics.for_data(data)
    values, details = metrics.measure(sums)
    sizes = supervised_bytes(data) if metrics.of_tokens else None
    extra = {} if sizes is None else {"bytes": sizes}
    counts = {name: values[name] for name in ("tokens",) if name in values}
    order = hashlib.sha256(np.asarray(data.eval["row"][:], dtype=np.int64).tobytes()).hexdigest()
    return Measurement(len(sums[0]), metrics.score(sums, extra), metrics.shares, counts, details, order=order)


def supervised_bytes(data: PreparedData) -> np.ndarray | None:
    """Bytes of text behind the supervised tokens, `[examples]`; None for labels, or if tokens do not correspond to bytes."""
    from hfstrat.data.token_bytes import token_bytes
    from hfstrat.trainer.baselines import row_bytes

    sizes = None if data.label_names else token_bytes(data.renderer.tokenizer)
    return None if sizes is None else row_bytes(data.eval, sizes)


def read_rows(folder: Path) -> Columns:
    """The stored columns and two derived ones (`rows`, `bits`), by ascending `row`; the pieces of a split example are summed.

    Returns:
        An empty dict if the file is missing or incomplete.
    """
    try:
        with np.load(folder / ROWS_FILE) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    numbers, first, place = np.unique(stored.pop("row"), return_index=True, return_inverse=True)
    joined = {
        name: values[first] if values.dtype.kind == "i" else np.bincount(place, weights=values, minlength=len(numbers))
        for name, values in stored.items()
    }
    return {"row": numbers, "rows": np.ones(len(numbers)), "bits": joined["nll"] / math.log(2), **joined}


# the resampled metrics of the measurement before training, so that a resumed run can pair it with the one after

BEFORE_FILE = "measured_before.json"


def keep_samples(folder: Path, found: dict[str, Measurement]) -> None:
    """Write the metrics of each resample with the digest of its examples, atomically."""
    kept = {name: {"rows": one.rows, "order": one.order, "samples": one.samples} for name, one in found.items()}
    partial = folder / f"{BEFORE_FILE}.partial"
    partial.write_text(json.dumps(kept), encoding="utf-8")
    partial.replace(folder / BEFORE_FILE)


def kept_samples(folder: Path) -> dict[str, dict[str, Any]]:
    """What `keep_samples` wrote: the keywords `rows`, `order` and `kept` of each Measurement; empty if it is gone or broken."""
    try:
        stored = json.loads((folder / BEFORE_FILE).read_text(encoding="utf-8"))
        parts = {
            name: {"rows": one["rows"], "order": one["order"], "kept": tuple(one["samples"])} for name, one in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return parts
