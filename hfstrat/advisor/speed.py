"""How long a run takes: operations over a rate. No torch here; a child process may have it."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.advisor.hardware import Device
from hfstrat.advisor.shapes import Model
from hfstrat.models.fingerprint import processor
from hfstrat.models.parameter_names import BLOCK, EMBEDDING, HEAD
from hfstrat.strategies.base import Learning

SHARE = {"cpu": 0.45, "gpu": 0.35}  # of the products' rate that a step of a wide model reaches, where nothing was measured
HALF_WIDTH = 768  # on a CPU, of a model whose steps spend as long beside its products as in them
FORWARD = 2.0  # times the rate of a step: nothing is kept for gradients, batches are larger
START_SECONDS = 25.0  # imports, loading, and the fresh process that verifies the result
PAYS = 1.1  # as in hfstrat.strategies.frozen.precompute
RATES_FILE = "advisor-rates.json"
MATMUL = """
import json, os, time, torch
dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
a, b = (torch.randn(*shape, dtype=dtype) for shape in ((512, 1024), (1024, 4096)))
a @ b
best = 0.0
for _ in range(20):
    started = time.perf_counter()
    a @ b
    best = max(best, 2 * 512 * 1024 * 4096 / (time.perf_counter() - started))
print(json.dumps(best))
"""


class Work(NamedTuple):
    """Floating-point operations of a token: in training, and in an evaluation; `once`: of the frozen part that is computed
    once."""

    training: float
    evaluation: float
    once: float = 0.0


class Rate(NamedTuple):
    """Operations a second, where that is from, and the relative error that was found for it (None: not validated).

    `product`: the rate of the machine's products, where `value` is from that.
    """

    value: float
    source: str
    band: float | None = None
    product: float = 0.0

    def of(self, width: int) -> Rate:
        """The same for a model of this width."""
        return self._replace(value=share(width) * self.product) if self.product else self


def share(width: int) -> float:
    """Of the products' rate that whole steps reach on a CPU: the roofline (Williams et al. 2009).

    A token's products are width squared and what stands between them (norms, activations, casts) is width, so that the time
    beside the products is to that of the products as a constant to the width: benchmarks/results/time_prediction.md.
    """
    return SHARE["cpu"] * width / (width + HALF_WIDTH)


def work(
    model: Model, learning: Learning, length: float, supervised: float, recompute: bool = False, epochs: float = 1.0
) -> Work:
    """Count them: two for each weight of a product, and those of attention; the backward pass goes once through what is above
    the lowest learning weight, and once more for each weight that learns.

    Args:
        length: tokens of a row, on average.
        supervised: share of the tokens that carry loss.
        epochs: how often what is kept is used.
    """
    depth = 1 + max((int(m.group(1)) for name in learning.shapes if (m := BLOCK.search(name))), default=-1)
    attention = 4.0 * length * model.heads * model.head_width * (1.0 if model.is_encoder else 0.5)
    touched = set(learning.names | learning.adapted)
    below = any(BLOCK.search(name) is None and not HEAD.search(name) and _is_table(name) for name in learning.names)
    lowest = 0 if below else min((int(m.group(1)) for name in touched if (m := BLOCK.search(name))), default=depth)
    frozen = live = weights = adapters = 0.0
    for name, shape in learning.shapes.items():
        match = BLOCK.search(name)
        if match is None or len(shape) != 2:
            continue
        if int(match.group(1)) < lowest:
            frozen += 2.0 * prod(shape)
            continue
        live += 2.0 * prod(shape)
        weights += 2.0 * prod(shape) * (name in learning.names)
        adapters += 2.0 * learning.rank * sum(shape) * (name in learning.adapted)
    frozen, live = frozen + attention * lowest, live + attention * (depth - lowest)
    head = _head(model, learning) * supervised
    head_learns = any(HEAD.search(name) for name in learning.names) or (
        model.tied and any(EMBEDDING.search(name) for name in learning.names)
    )
    teacher = 2.0 * learning.teacher
    forward = frozen + live + adapters + head
    backward = live + weights + 2 * adapters + head * (1 + head_learns) + attention * (depth - lowest) * (weights > 0)
    again = live + adapters if recompute else 0.0
    whole = Work(forward + backward + again, forward, once=teacher)
    if learning.body_once or (learning.keeps_prefix and (learning.still or not model.dropout)):
        kept = Work(whole.training - frozen, forward, once=frozen + teacher)
        if learning.body_once or gain(frozen, kept.training, epochs) >= PAYS:
            return kept
    return whole


def gain(once: float, rest: float, epochs: float) -> float:
    """How many times faster epochs are where `once` is computed once, as in `strategies.frozen.precompute` (needs torch)."""
    return epochs * (once + rest) / (once + epochs * rest)


def _is_table(name: str) -> bool:
    return bool(EMBEDDING.search(name)) or "embeddings" in name or ".wte" in name


def _head(model: Model, learning: Learning) -> float:
    """Operations a token of the LM head; heads of classifiers cost nothing."""
    is_lm = not any(re.search(r"(^|\.)(score|classifier)\.", name) for name in learning.shapes)
    return 2.0 * model.vocabulary * model.width if is_lm and not model.is_encoder else 0.0


def seconds(load: Work, tokens: float, epochs: float, eval_tokens: float, evaluations: float, rate: float) -> float:
    """Of a whole run: what is computed once, the epochs, the evaluations, and its start."""
    forward = load.once * (tokens + eval_tokens) + load.evaluation * eval_tokens * evaluations
    return START_SECONDS + (forward / FORWARD + load.training * tokens * epochs) / rate


def rate_of(device: Device, reports: Iterable[Rate] = ()) -> Rate:
    """The rate of a device: from reports of runs on it where there are some, else a share of that of its products."""
    from hfstrat.advisor import memory

    if device.is_cpu:
        found = list(reports)
        if found:
            middle = statistics.median(rate.value for rate in found)
            return Rate(middle, f"{len(found)} past runs on this machine", memory.time_band("reports"))
        rate = matmul_rate()
        return Rate(SHARE["cpu"] * rate, "a matrix product timed on this machine", memory.time_band("product"), rate)
    return Rate(SHARE["gpu"] * device.peak, f"the data sheet of {device.name}")


def matmul_rate() -> float:
    """Operations a second of a product in the precision that training has here, in a child process once, then from a file."""
    from hfstrat.data.cache import folder

    file, key = folder() / RATES_FILE, f"{processor()}, {threads()} threads"
    known = _read(file)
    if key in known:
        return float(known[key])
    ended = subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True, check=False)
    try:
        known[key] = float(json.loads(ended.stdout))
    except ValueError:
        return _numpy_rate()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known))
    return float(known[key])


def threads() -> int:
    """How many torch would use: a process that may use one core of many has the rate of one."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(said)) if said.isdigit() and int(said) else cores


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numpy_rate() -> float:
    """Where there is no torch: in float32."""
    import numpy as np

    a, b = np.ones((512, 1024), np.float32), np.ones((1024, 4096), np.float32)
    a @ b
    started = time.perf_counter()
    for _ in range(5):
        a @ b
    return 5 * 2 * 512 * 1024 * 4096 / (time.perf_counter() - started)


def of_reports(folder: Path) -> list[Rate]:
    """The rates of past runs on this machine, from the `report.json` files below a folder."""
    found = []
    for file in sorted(folder.rglob("report.json")):
        report = _read(file)
        where = report.get("environment", {})
        if (where.get("processor"), where.get("threads")) == (processor(), threads()) and (rate := of_report(report)):
            found.append(Rate(rate, str(file)))
    return found


def of_report(report: dict[str, Any]) -> float | None:
    """Operations a second of a finished run; None where it cannot be told."""
    from hfstrat import strategies
    from hfstrat.advisor import shapes
    from hfstrat.errors import UserError
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks import TASKS

    try:
        recipe, result = Recipe.model_validate(report["run"]["recipe"]), report["result"]
        model, plan = shapes.read(recipe.model.name_or_path), result["plan"]
        account = report["run"]["data"]["train"]
        made = TASKS[recipe.task].shapes(model.shapes, model.config, 2)
        if made is None or result.get("status") != "done":
            return None
        learning = strategies.build(recipe.strategy).learning(*made)
        length = account["tokens"] / max(1, account["rows_kept"])
        load = work(model, learning, length, account["supervised"] / max(1, account["tokens"]), plan["checkpointing"])
        return None if learning.body_once else float(result["tokens_per_second"]) * load.training
    except (UserError, KeyError, TypeError, ValueError):
        return None
