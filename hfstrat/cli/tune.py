"""`hfstrat tune`: the advisor's order of the candidates, and one process for each further GPU. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from hfstrat.advisor import decide, hardware, measure, recipes, speed
from hfstrat.advisor.speed import Rate
from hfstrat.cli import advise
from hfstrat.engine import children
from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.recipe.load import Loaded
from hfstrat.run import launch
from hfstrat.trainer.plan import HEADROOM
from hfstrat.tuning.options import Advice, Advise, Options
from hfstrat.tuning.runner import Runner
from hfstrat.tuning.tune import OPTIONS

EVALUATIONS = 2.0  # of the shortest run: of its rung, and of its result


def adviser(options: Options) -> Advise:
    """What orders the candidates of a search: the advisor, which measures first if there is time for it."""

    def advise_for(loaded: Mapping[str, Loaded], seconds: float) -> Advice:
        rate = speed.rate_of(hardware.find_device("auto"))
        predicted = recipes.predict(loaded, rate)
        limit = hardware.find_device("auto").memory
        excluded = {
            label: f"it needs about {format.memory(found['memory_bytes'])}, and {format.memory(limit)} are available"
            for label, found in predicted.items()
            if found.get("memory_bytes", 0.0) > limit * HEADROOM
        }
        ranks = {label: float(predicted.get(label, {}).get("rank", len(loaded))) for label in loaded}
        lines: list[str] = []
        if seconds > 0 and options.model is not None:
            measured, lines = measured_ranks(options, list(loaded), seconds)
            ranks |= measured
        order = sorted((label for label in loaded if label not in excluded), key=lambda label: ranks[label])
        return Advice(order, {label: least(one, rate) for label, one in loaded.items()}, excluded, lines)

    return advise_for


def measured_ranks(options: Options, names: list[str], seconds: float) -> tuple[dict[str, float], list[str]]:
    """The places of strategies after measuring the probe and real steps, and lines about what was measured."""
    try:
        situation = advise.situation_of(
            advise.Request(model=options.model, data=options.data, task=options.task, time=f"{options.time:.0f}s")
        )
        if measure.obstacle(situation) is not None:
            return {}, []
        found = measure.measure(situation, names, seconds)
        ranked = decide.decide(replace(situation, measured=found), names).ranked
    except UserError as error:  # known runs still have an order
        return {}, [f"nothing was measured before the search: {error}"]
    return {scored.name: float(place) for place, scored in enumerate(ranked)}, found.lines


def least(loaded: Loaded, rate: Rate) -> float:
    """Seconds of the shortest complete run of a recipe: start, cached computations, one step, two evaluations; 0 if unknown."""
    try:
        candidate, survey = recipes.candidate_of(loaded.recipe)
    except UserError:
        return 0.0
    work = decide.work_of(candidate, survey, False, 1.0)
    held_out = loaded.recipe.data.eval_size
    rows = min(1000.0, held_out if held_out >= 1 else held_out * survey.rows)
    steps = max(1.0, survey.rows / loaded.recipe.training.global_batch_size)
    if rate.product:
        rate = rate._replace(fixed=speed.fixed_cost(candidate.model, candidate.description, 1))
    return speed.seconds(work, survey.tokens, steps, 1 / steps, rows * survey.mean_length, EVALUATIONS, rate)


def devices() -> list[str]:
    """The values of CUDA_VISIBLE_DEVICES for one process per GPU; empty without GPUs."""
    count, visible = launch.count_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible is not None else [str(number) for number in range(count)]
    return names[:count]


def runner(folder: Path) -> Runner:
    """What runs the jobs of this process, on its first GPU if there is one."""
    return Runner(folder, next(iter(devices()), None))


@contextlib.contextmanager
def helpers(folder: Path) -> Iterator[None]:
    """One more process for each GPU but the first; they join the search once it exists, and end with it."""
    started: list[subprocess.Popen[bytes]] = []
    for device in devices()[1:]:
        started.append(start_helper(folder, device))
    try:
        yield
    finally:
        for child in started:
            children.terminate(child)


def start_helper(folder: Path, device: str) -> subprocess.Popen[bytes]:
    """A process that waits for the search in a folder and joins it on a GPU."""
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": device}
    with open(os.devnull, "w", encoding="utf-8") as log:
        return children.start([sys.executable, "-m", "hfstrat.cli.tune", str(folder), str(os.getpid())], environment, log)


def wait_and_join(folder: Path, parent: int, join: Callable[[Path], int]) -> int:
    """Join a search as soon as its options exist; gives up when the process that starts it ends."""
    import time

    while not (folder / OPTIONS).is_file():
        if os.getppid() != parent:
            return 0
        time.sleep(children.TICK)
    return join(folder)


if __name__ == "__main__":
    from hfstrat.tuning.tune import join

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(wait_and_join(Path(sys.argv[1]), int(sys.argv[2]), lambda folder: join(folder, runner)))
