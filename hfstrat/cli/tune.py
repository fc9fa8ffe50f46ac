"""`hfstrat tune`: the advisor's order of the candidates, and one process for each further GPU. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hfstrat.advisor import decide, generation, hardware, measure, recipes, speed
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.speed import Rate
from hfstrat.cli import advise
from hfstrat.engine import children
from hfstrat.errors import UserError
from hfstrat.recipe import format
from hfstrat.recipe.load import Loaded
from hfstrat.recipe.schema import Model
from hfstrat.run import launch
from hfstrat.strategies import defaults
from hfstrat.tasks import TASKS
from hfstrat.trainer.plan import HEADROOM
from hfstrat.tuning.options import Advice, Advise, Options
from hfstrat.tuning.runner import Runner
from hfstrat.tuning.tune import OPTIONS

TRAINING_SHARE = 0.9  # of the time, less the start, in which a candidate trains: evaluations take the rest
# seconds in which the base reads some of the texts, its loading included, and the time of which they are a small enough share
BASE_SECONDS, BASE_FROM = 14.0, 120.0
UNLIKELY = 0.1  # probability of being the best, below which a search that cannot try all leaves a candidate out


def adviser(options: Options) -> Advise:
    """What orders the candidates of a search: the advisor, which measures first if there is time for it."""

    def advise_for(loaded: Mapping[str, Loaded], seconds: float) -> Advice:
        scored, unlikely, lines = scored_at_the_end(options, loaded, seconds)
        new = new_models(scored, options)
        loaded = {label: new[label].in_place_of(one) if label in new else one for label, one in loaded.items()}
        rate = speed.rate_of(hardware.find_device("auto"))
        predicted = recipes.predict(loaded, rate)
        limit = hardware.find_device("auto").memory
        excluded = {
            label: f"it needs about {format.memory(found['memory_bytes'])}, and {format.memory(limit)} are available"
            for label, found in predicted.items()
            if found.get("memory_bytes", 0.0) > limit * HEADROOM
        }
        ranks = {label: float(predicted.get(label, {}).get("rank", len(loaded))) for label in loaded}
        ranks |= {each.name: float(place) for place, each in enumerate(scored)}
        order = sorted((label for label in loaded if label not in excluded), key=lambda label: ranks[label])
        found = {label: times(one, rate) for label, one in loaded.items()}
        by_name = {name: {label: getattr(each, name) for label, each in found.items()} for name in Times._fields}
        rows = round(max(by_name.pop("rows").values(), default=0.0))
        return Advice(
            order,
            excluded=excluded,
            lines=lines,
            rows=rows,
            unlikely=unlikely,
            sized={label: one.overrides for label, one in new.items()},
            **by_name,  # type: ignore[arg-type]
        )

    return advise_for


def scored_at_the_end(
    options: Options, loaded: Mapping[str, Loaded], seconds: float
) -> tuple[tuple[decide.Scored, ...], tuple[str, ...], list[str]]:
    """Strategies by their expected quality when the time is over, those that are unlikely to be the best, and lines about what
    was measured. Nothing for recipes, and where the command line changes the strategies: their own predictions order them.

    Args:
        seconds: for measuring the probe and real steps; 0: at most how well the base predicts the texts, which a comparison
            with new weights depends on.
    """
    if options.model is None or any(each.startswith(("strategy", "model")) for each in options.overrides):
        return (), (), []
    own = tuple(each for each in options.overrides if each.startswith(advise.SECTIONS))
    request = advise.Request(model=options.model, data=options.data, task=options.task, overrides=own)
    lines, timed = list[str](), list(loaded)
    if not seconds and options.time >= BASE_FROM and has_new_weights(loaded):
        seconds, timed = BASE_SECONDS, []
    try:
        situation = advise.situation_of(replace(request, time=f"{TRAINING_SHARE * options.time:.0f}s"))
        situation = replace(situation, evaluations=0.0, by_clock=True)
        if seconds and measure.obstacle(situation) is None:
            try:
                situation = replace(situation, measured=(found := measure.measure(situation, timed, seconds)))
                lines = found.lines
            except UserError as error:  # known runs still have an order
                lines = [f"nothing was measured before the search: {str(error).removeprefix('--measure: ')}"]
        ranked = decide.decide(situation, list(loaded)).ranked
        able = [each.name for each in ranked if each.timed.fits]  # the best of those that will run
        rivals = decide.decide(situation, able).ranked if 0 < len(able) < len(ranked) else ranked
        unlikely = (each.name for each in rivals if each.expected.best is not None and each.expected.best < UNLIKELY)
        return ranked, tuple(unlikely), lines
    except UserError:  # what is wrong with the data or the model, the candidates themselves say
        return (), (), lines


class NewModel(NamedTuple):
    """A new model of a size that suits the texts and the time: its strategy, and settings of `training`."""

    candidate: Candidate
    training: dict[str, float]

    @property
    def overrides(self) -> list[str]:
        """What makes it of a recipe that has the shape of the base."""
        own = [f"strategy={json.dumps(self.candidate.section)}", 'model.name_or_path=""']
        return own + [f"training.{key}={value}" for key, value in self.training.items()]

    def in_place_of(self, loaded: Loaded) -> Loaded:
        """That recipe with the overrides."""
        training = loaded.recipe.training.model_copy(update=self.training)
        own = {"strategy": self.candidate.strategy, "model": Model(), "training": training}
        return replace(loaded, recipe=loaded.recipe.model_copy(update=own))


def new_models(scored: Sequence[decide.Scored], options: Options) -> dict[str, NewModel]:
    """Those of the strategies that train new weights, by their names; not for files, whose new models have a size already."""
    found = {}
    for each in (one.candidate for one in scored):
        if each.strategy.needs_weights or each.data is not None:
            continue
        rate = defaults.learning_rate(each.name, each.model.width)
        is_given = any(override.startswith("training.learning_rate") for override in options.overrides)
        found[each.name] = NewModel(each, {} if rate is None or is_given else {"learning_rate": rate})
    return found


def has_new_weights(loaded: Mapping[str, Loaded]) -> bool:
    """Whether some candidates generate with new weights, and others with those of the base."""
    generating = [one.recipe.strategy for one in loaded.values() if TASKS[one.recipe.task].text.generates]
    return len({strategy.needs_weights for strategy in generating}) > 1


class Times(NamedTuple):
    """Predicted seconds of a recipe; 0 where they are unknown.

    least: of the shortest complete run without evaluations: start, cached computations, one step.
    evaluation: of one evaluation on all `rows` that are held out.
    step: of an optimizer step.
    samples: of the answers that the final run shows.
    """

    least: float = 0.0
    evaluation: float = 0.0
    step: float = 0.0
    samples: float = 0.0
    rows: float = 0.0


def times(loaded: Loaded, rate: Rate) -> Times:
    try:
        candidate, survey = recipes.candidate_of(loaded.recipe)
    except UserError:
        return Times()
    work = decide.work_of(candidate, survey, False, None)
    held_out = loaded.recipe.data.eval_size
    rows = min(1000.0, held_out if held_out >= 1 else held_out * survey.rows)
    steps = max(1.0, survey.rows / loaded.recipe.training.global_batch_size)
    on_cpu, batch = hardware.find_device("auto").is_cpu, loaded.recipe.training.global_batch_size
    answers, prompt = survey.generation, survey.prompt_length
    passes = recipes.shape_of_recipe(loaded.recipe, survey, candidate.description.body_once, on_cpu, 2).passes
    rate = speed.on_cpu(rate, candidate.model, candidate.description, work, survey.supervised_share, passes)
    rate = generation.with_answers(rate, candidate.model, answers, prompt, batch, on_cpu)
    answering = generation.evaluation_seconds(rows, candidate.model, answers, prompt, rate, on_cpu)
    held = rows * survey.mean_length
    start, shortest, measured = (
        speed.seconds(work, survey.tokens, steps, epochs, held, evaluations, rate)
        + decide.reading_seconds(work, survey, rows, epochs, evaluations)
        + evaluations * answering
        for epochs, evaluations in ((0.0, 0.0), (1 / steps, 0.0), (0.0, 1.0))
    )
    wanted, task = loaded.recipe.evaluation, TASKS[loaded.recipe.task]
    shown = generation.Generation(1, wanted.max_new_tokens).seconds(candidate.model, 1, prompt, rate, on_cpu)
    samples = shown * (len(wanted.prompts) or wanted.samples) if task.text.generates else 0.0
    return Times(shortest, measured - start, shortest - start, samples, rows)


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
