"""How long a run takes: a fixed cost per step, and operations per token divided by a rate. No torch in this process; a child
process may import it."""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import NamedTuple

from hfstrat import strategies
from hfstrat.advisor import architecture
from hfstrat.advisor.architecture import Model, live_blocks
from hfstrat.advisor.hardware import Device, cores, has_bfloat16, time_band
from hfstrat.data import cache
from hfstrat.errors import UserError
from hfstrat.models.fingerprint import processor
from hfstrat.models.load import read_json
from hfstrat.models.parameter_names import BLOCK, EMBEDDING, HEAD, count_blocks
from hfstrat.strategies.description import PAYS, Description
from hfstrat.tasks import TASKS
from hfstrat.tasks import report as reports
from hfstrat.tasks.report import Failure, Report

SHARE = {"cpu": 0.95, "gpu": 0.35}  # of the rate of matrix products, reached by those of steps if nothing was measured
ASSUMED = 40e9  # operations per second of a thread, if no matrix product can be timed
# What a step on a CPU takes besides its products, measured with blocks of width 64 to 1,024 and 32 to 1,024 tokens on a thread
# of an Intel Xeon with AMX, where products take a fifth of a step. Fixed: seconds of a pass through a block (two more of
# the backward pass), and per trainable parameter: of casting it in each pass, and of the optimizer in each step.
BLOCK_SECONDS, CAST_SECONDS, OPTIMIZER_SECONDS = 0.6e-3, 4.5e-9, 3.3e-9
# per token: seconds of a pass through a block, and those for each number of its width, forward and backward; and for each entry
# of the vocabulary that a token is scored against, in training and in evaluation
FORWARD_SECONDS, BACKWARD_SECONDS, VOCABULARY_SECONDS = (2e-6, 15e-9), (16e-6, 55e-9), (6e-9, 4e-9)
ADAPTED = 2.0  # times the passes through a block with adapters
STEP_SECONDS = 0.02  # of the Trainer in each step
FORWARD = 2.0  # times the rate of a training step with all of its operations: nothing is stored for gradients
START_SECONDS = 25.0  # imports, loading, and the new process that verifies the result
RATES_FILE = "advisor-rates-2.json"
MATMUL = """
import json, time, torch
from hfstrat.advisor.hardware import Busyness
dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
a, b = (torch.randn(*shape, dtype=dtype) for shape in ((512, 1024), (1024, 4096)))
a @ b
busyness, until, best = Busyness(), time.perf_counter() + 1.0, 0.0
while time.perf_counter() < until:
    started = time.perf_counter()
    a @ b
    best = max(best, 2 * 512 * 1024 * 4096 / (time.perf_counter() - started))
print(json.dumps({"rate": best, "others": busyness.of_others()}))
"""
BUSY = 0.15  # share of the cores that other processes may use before a measured speed is not believed


class Work(NamedTuple):
    """Floating-point operations per token in training and evaluation.

    once: of what is computed once and cached: the frozen blocks if `caches`, and a teacher.
    """

    training: float
    evaluation: float
    once: float = 0.0
    caches: bool = False


class Rate(NamedTuple):
    """Operations per second, their source, and the relative error of times predicted from it (None: not validated).

    product: the rate of matrix products on the machine, if `value` is derived from it: other operations are counted apart.
    fixed: seconds of an optimizer step that do not depend on its tokens.
    token, eval_token, once_token: seconds besides matrix products of each token in training, in evaluation, and of what is
        computed once.
    processes: that share the work of a run, each on cores of its own.
    """

    value: float
    source: str
    band: float | None = None
    product: float = 0.0
    fixed: float = 0.0
    token: float = 0.0
    eval_token: float = 0.0
    once_token: float = 0.0
    processes: int = 1


def fixed_cost(model: Model, description: Description, passes: float, caches: bool = False) -> float:
    """Seconds of an optimizer step on a CPU that do not depend on its tokens.

    Args:
        passes: micro-batches of a step.
        caches: whether cached states stand for the frozen blocks.
    """
    count = len(live_blocks(model, description))
    backward = count * (ADAPTED if description.rank else 1.0)
    casts = CAST_SECONDS * passes * has_bfloat16()
    through = BLOCK_SECONDS * passes * ((count if caches else model.layers) + 2 * backward)
    return STEP_SECONDS + through + (casts + OPTIMIZER_SECONDS) * description.footprint.trainable / threads()


def on_cpu(rate: Rate, model: Model, description: Description, work: Work, supervised: float, passes: float) -> Rate:
    """A rate of matrix products with what the steps of a strategy take besides them; another rate as it is.

    Args:
        supervised: share of the tokens that contribute to the loss.
        passes: micro-batches of a step.
    """
    if not rate.product:
        return rate
    live = len(live_blocks(model, description))
    forward, backward = (a + b * model.width for a, b in (FORWARD_SECONDS, BACKWARD_SECONDS))
    scored = supervised * model.vocabulary if _head(model, description) else 0.0
    through = live if work.caches else model.layers
    training = through * forward + live * (ADAPTED if description.rank else 1.0) * backward + VOCABULARY_SECONDS[0] * scored
    evaluation = model.layers * forward + VOCABULARY_SECONDS[1] * scored
    once = (model.layers - live) * forward if work.caches else 0.0
    once += model.layers * forward * description.teacher / max(1.0, model.parameters)  # of a teacher of the same kind
    cores = threads() * rate.processes
    return rate._replace(
        fixed=fixed_cost(model, description, passes / rate.processes, work.caches),
        token=training / cores,
        eval_token=evaluation / cores,
        once_token=once / cores,
    )


def work(
    model: Model, description: Description, length: float, supervised: float, recompute: bool = False, epochs: float = 1.0
) -> Work:
    """Count operations: two per weight of a product, plus attention. The backward pass goes once through everything above the
    lowest trainable weight, and once more for each trainable weight.

    Args:
        length: average tokens per example.
        supervised: share of the tokens that contribute to the loss.
        epochs: how often cached states are used.
    """
    depth = count_blocks(description.shapes)
    attention = 4.0 * length * model.heads * model.head_width * (1.0 if model.is_encoder else 0.5)
    lowest = depth - len(live_blocks(model, description))
    frozen = live = weights = adapters = 0.0
    for name, shape in description.shapes.items():
        match = BLOCK.search(name)
        if match is None or len(shape) != 2:
            continue
        if int(match.group(1)) < lowest:
            frozen += 2.0 * prod(shape)
            continue
        live += 2.0 * prod(shape)
        weights += 2.0 * prod(shape) * (name in description.names)
        adapters += 2.0 * description.rank * sum(shape) * (name in description.adapted)
    frozen, live = frozen + attention * lowest, live + attention * (depth - lowest)
    frozen, live, weights = with_stem(model, description, frozen, live, weights)
    head = _head(model, description) * supervised
    trains_head = any(HEAD.search(name) or (model.tied and EMBEDDING.search(name)) for name in description.names)
    teacher = 2.0 * description.teacher
    forward = frozen + live + adapters + head
    backward = live + weights + 2 * adapters + head * (1 + trains_head) + attention * (depth - lowest) * (weights > 0)
    again = live + adapters if recompute else 0.0
    full = Work(forward + backward + again, forward, once=teacher)
    if description.body_once or (description.keeps_prefix and (description.still or not model.dropout)):
        cached = Work(full.training - frozen, forward, once=frozen + teacher, caches=True)
        if description.body_once or gain(frozen, cached.training, epochs) >= PAYS:
            return cached
    return full


def with_stem(model: Model, description: Description, frozen: float, live: float, weights: float) -> tuple[float, float, float]:
    """The same operations with those of the layers before the blocks."""
    stem = model.stem.operations
    if not architecture.trains_stem(description):
        return frozen + stem, live, weights
    return frozen, live + stem, weights + stem


def gain(once: float, rest: float, epochs: float) -> float:
    """The speedup of training if `once` is computed once, as in `strategies.frozen.precompute` (which imports torch)."""
    return epochs * (once + rest) / (once + epochs * rest)


def _head(model: Model, description: Description) -> float:
    """Operations per token of the LM head; classification heads cost nothing."""
    is_lm = not any(re.search(r"(^|\.)(score|classifier)\.", name) for name in description.shapes)
    return 2.0 * model.vocabulary * model.width if is_lm and not model.is_encoder else 0.0


def seconds(
    load: Work, tokens: float, steps: float, epochs: float, eval_tokens: float, evaluations: float, rate: Rate
) -> float:
    """Seconds of a complete run: cached computations, epochs, evaluations and start-up.

    Args:
        tokens, steps: of an epoch.
    """
    once = tokens + eval_tokens if load.once else 0.0
    evaluated = eval_tokens * evaluations if load.evaluation else 0.0
    forward = (load.once * once + load.evaluation * evaluated) / (rate.value * (1.0 if rate.product else FORWARD))
    trained = tokens * epochs if load.training else 0.0
    others = rate.token * trained + rate.eval_token * evaluated + rate.once_token * once
    fixed = rate.fixed * steps * epochs if load.training else 0.0
    return START_SECONDS + fixed + others + forward + load.training * trained / rate.value


def rate_of(device: Device, reports: Iterable[Rate] = ()) -> Rate:
    """The rate of a device: from reports of past runs if there are any, otherwise a share of its rate of matrix products."""
    if device.is_cpu:
        found = list(reports)
        if found:
            middle = statistics.median(rate.value for rate in found)
            return Rate(middle, f"{len(found)} past runs on this machine", time_band("reports"))
        rate, others = matmul_rate()
        source = "a matrix product timed on this machine"
        if rate is None:
            rate, source = ASSUMED * threads(), "an assumed rate, since the process that times a matrix product failed"
        if others > BUSY:
            source += f" while other processes used {others:.0%} of it, so times on a free machine are shorter"
        return Rate(SHARE["cpu"] * rate, source, None if others > BUSY else time_band("product"), rate)
    return Rate(SHARE["gpu"] * device.peak, f"the data sheet of {device.name}")


def matmul_rate() -> tuple[float | None, float]:
    """Operations per second of a matrix product in the training precision, and the share of the machine that other processes
    used meanwhile; measured once, and stored for later processes if the machine was free.

    The rate is None if the process that measures it fails, as where memory is short or torch does not load.
    """
    file, key = cache.folder() / RATES_FILE, f"{processor()}, {threads()} threads"
    known = read_json(file)
    if key in known:
        return float(known[key]), 0.0
    rate, others = time_product(key)
    if rate is not None and others <= BUSY:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known | {key: rate}))
    return rate, others


def stored_rate() -> Rate | None:
    """The rate of this machine's CPU, if it was measured before; measuring it takes seconds."""
    known = read_json(cache.folder() / RATES_FILE).get(f"{processor()}, {threads()} threads")
    if known is None:
        return None
    source = "a matrix product timed on this machine"
    return Rate(SHARE["cpu"] * float(known), source, time_band("product"), float(known))


@functools.cache
def time_product(machine: str) -> tuple[float | None, float]:
    """`matmul_rate` by a child process; once in this process for a machine, since a candidate more makes it no other one."""
    ended = subprocess.run([sys.executable, "-c", MATMUL], capture_output=True, text=True, check=False)
    try:
        found = json.loads(ended.stdout.strip().splitlines()[-1])
        return float(found["rate"]), float(found["others"])
    except (IndexError, ValueError, TypeError, KeyError):
        return None, 0.0


def threads() -> int:
    """The number of threads torch uses: OMP_NUM_THREADS, at most the cores available to this process."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores(), int(wanted)) if wanted.isdigit() and int(wanted) else cores()


def rates_of_reports(folder: Path) -> list[Rate]:
    """The rates of past runs on this machine, from the `report.json` files below a folder."""
    found = []
    for run, report in reports.find(folder):
        where = report.environment
        if (where.processor, where.threads) == (processor(), threads()) and (rate := rate_of_report(report)):
            found.append(Rate(rate, str(run / reports.FILE)))
    return found


def rate_of_report(report: Report) -> float | None:
    """Operations per second of a finished run; None if it cannot be derived."""
    recipe, result, data = report.run.recipe, report.result, report.run.data
    if isinstance(result, Failure) or data is None or recipe.objective.generates:  # its tokens include generated ones
        return None
    try:
        task = TASKS[recipe.task]
        if task.rows.kind is not None:  # decoding is in their speed, and no tokens are in their statistics
            return None
        model = architecture.read(recipe.model.name_or_path)
        made = architecture.parameters_of(model, task, 2)
        if made is None:
            return None
        description = strategies.build(recipe.strategy).describe(*made)
        length = data.train.tokens / max(1, data.train.rows_kept)
        supervised = data.train.supervised / max(1, data.train.tokens)
        load = work(model, description, length, supervised, result.plan.checkpointing)
        return None if description.body_once else result.tokens_per_second * load.training
    except (UserError, KeyError, TypeError, ValueError):
        return None
