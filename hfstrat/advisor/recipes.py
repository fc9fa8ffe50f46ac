"""Ready recipes for the first strategies; each is loaded and checked before it is promised.

What the adviser says of recipes that are there already: memory, time, standing. No torch, and well under a second each."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hfstrat import strategies
from hfstrat.advisor import data, fitting, hardware, memory, rules, shapes, speed, verdict
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.fitting import Fit, imports
from hfstrat.advisor.memory import Shape
from hfstrat.advisor.shapes import Model
from hfstrat.advisor.verdict import Advice, Situation
from hfstrat.errors import UserError
from hfstrat.recipe.load import Loaded, load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.section import seconds
from hfstrat.run import preflight
from hfstrat.strategies.defaults import Prediction
from hfstrat.tasks import TASKS
from hfstrat.trainer.plan import modest_eval_batch, modest_micro_batch

MOST = 3


def write(advices: list[Advice], situation: Situation, folder: Path) -> list[Path]:
    """The recipes of the first three that can be had in the time; none, and no folder, where there are none.

    Raises:
        UserError: sizes given by hand, a file in the place of the folder, or a recipe there already.
    """
    if situation.model.by_hand or situation.data.by_hand:
        raise UserError("--write: a recipe needs a model and data; give --model and --data instead of sizes")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--write: {folder} is a file; name a folder")
    if there := sorted(folder.glob("*.yaml")):
        raise UserError(f"--write: {there[0]} is there already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for advice in advices:
        if len(files) < MOST and advice.can and advice.in_time and advice.fit and advice.fit.kind != "does not fit":
            file = folder / f"{len(files) + 1}-{advice.name}.yaml"
            file.write_text(text_of(advice, situation), encoding="utf-8")
            try:
                preflight.check(load_recipe(str(file)), network=False)
            except UserError as error:  # such as too little text for a new tokenizer: the next one takes its place
                file.unlink()
                advice.refused = str(error)
            else:
                files.append(file)
    if not files:
        folder.rmdir()
    return files


def text_of(advice: Advice, situation: Situation) -> str:
    """The recipe with its reason in the first line."""
    assert advice.score is not None
    reason = advice.score.parts[0][0].says if advice.score.parts else ""
    body = yaml.safe_dump(recipe_of(advice, situation), sort_keys=False, width=120)
    return f"# {advice.name}, choice {advice.rank} of `hfstrat advise`: {reason}.\n{body}"


def recipe_of(advice: Advice, situation: Situation) -> dict[str, Any]:
    """What is not said is as hfstrat's defaults have it."""
    data, candidate = situation.data, advice.candidate
    assert candidate.strategy is not None
    assert advice.fit is not None
    found: dict[str, Any] = {"task": data.task}
    if candidate.strategy.needs_weights:
        name = full_path(situation.model.name)
        found["model"] = name if advice.fit.shape.frozen is None else {"name_or_path": name, "quantization": "nf4"}
    found["strategy"] = candidate.section
    found["data"] = {"train": full_path(data.source), "max_length": data.max_length}
    if not data.labels and data.cut_share:
        found["data"]["overflow"] = "split"
    cut_short = situation.time is not None and advice.time_words
    length: dict[str, Any] = {"num_train_epochs": candidate.epochs}
    if cut_short and situation.time is not None:  # what is not training comes on top of it
        length = {"max_time": f"{max(1.0, situation.time - speed.START_SECONDS):.0f}s"}
    training = {**length, **candidate.training, **advice.fit.settings}
    return {**found, "training": training, "output_dir": f"runs/advised-{advice.name}"}


def full_path(name: str) -> str:
    """A local path in full, so that the recipe works from anywhere; links stay what they are called."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else name


NOT_STARTED = speed.START_SECONDS * 0.4  # of the start that comes after training: the result is verified then


def predict(recipes: dict[str, Loaded]) -> dict[str, Prediction]:
    """By the recipe's name: `memory_bytes` (peak of the process) and `seconds` (until the weights are trained), each with a
    `_band` of low and high where it was validated; `rank` among these recipes, `verdict`, the reasons, and their `source`.

    What cannot be told is left out.
    """
    found: dict[str, Prediction] = {}
    points: dict[str, float] = {}
    for name, loaded in recipes.items():
        with contextlib.suppress(UserError):
            found[name], points[name] = _one(loaded.recipe)
    for rank, name in enumerate(sorted(points, key=lambda name: -points[name]), 1):
        found[name]["rank"] = rank
    return found


def _one(recipe: Recipe) -> tuple[Prediction, float]:
    """Raises UserError where nobody can tell."""
    candidate, survey = candidate_of(recipe)
    device = hardware.find_device("auto")
    model = candidate.model or shapes.read(recipe.model.name_or_path)
    situation = Situation(model, survey, device, device.memory, rate=speed.rate_of(device).of(model.width))
    assert candidate.model is not None
    assert candidate.learning is not None
    shape = shape_of_recipe(recipe, survey, candidate.learning.body_once, device.is_cpu, situation.compute)
    peak = memory.predict(candidate.model, candidate.learning, shape)
    advice = Advice(candidate.name, candidate, Fit("fits", "", peak, shape, {}))
    epochs = (
        recipe.training.num_train_epochs or (recipe.training.max_steps or 0) * recipe.training.global_batch_size / survey.rows
    )
    load = verdict.work_of(candidate, survey, shape.recompute, epochs or 1)
    total = speed.seconds(load, survey.tokens, epochs, situation.eval_tokens, verdict.EVALUATIONS, situation.rate.value)
    limit = seconds(recipe.training.max_time) if recipe.training.max_time else None
    took = total - NOT_STARTED if limit is None or not load.training else limit + speed.START_SECONDS - NOT_STARTED
    if recipe.training.max_steps and epochs < candidate.epochs:  # fewer than it would be advised to have
        advice.steps = recipe.training.max_steps * recipe.training.global_batch_size / fitting.GLOBAL_BATCH
    if limit is not None and load.training:
        each = load.training * survey.mean_length * recipe.training.global_batch_size
        advice.steps = limit * situation.rate.value / each
    advice.score = rules.score(verdict.facts_of(situation, advice, {}, {}), advice.name)
    said: Prediction = {"memory_bytes": peak.total + imports(device.is_cpu), "seconds": took}
    if (band := memory.memory_band()) is not None and device.is_cpu:
        reach = band.worst * peak.total
        said["memory_band"] = (said["memory_bytes"] - reach, said["memory_bytes"] + reach)
    if situation.rate.band is not None:
        said["seconds_band"] = (took / (1 + situation.rate.band), took * (1 + situation.rate.band))
    if reasons := advice.score.reasons():
        said["verdict"] = "; ".join(words for words, _ in reasons)
        said["source"] = "; ".join(dict.fromkeys(source for _, source in reasons))
    return said, advice.score.points


def candidate_of(recipe: Recipe) -> tuple[Candidate, data.Survey]:
    """The recipe's own strategy on its own rows. Raises UserError for what cannot be read without torch."""
    task, wanted = TASKS[recipe.task], recipe.strategy
    source, model = recipe.data.train[0].path, _model(recipe)
    survey = data.survey(source, model, recipe.task)
    survey = replace(survey, max_length=min(recipe.data.max_length, model.context))
    made = (model.shapes, model.tied) if model.by_hand else task.shapes(model.shapes, model.config, len(survey.labels))
    if made is None:
        raise UserError(f"model.name_or_path: {recipe.model.name_or_path}: its shapes are not known without torch")
    section, strategy = wanted.model_dump(exclude_unset=True), strategies.build(wanted)
    return Candidate(wanted.name, section, wanted, model, strategy.learning(*made), strategy.footprint(*made)), survey


def _model(recipe: Recipe) -> Model:
    size, words = recipe.strategy.size, recipe.strategy.new_tokenizer
    if size is None:
        return shapes.read(recipe.model.name_or_path)
    return shapes.by_hand(str(size), words.vocab_size if words else 32_000, recipe.data.max_length)


def shape_of_recipe(recipe: Recipe, survey: data.Survey, once: bool, on_cpu: bool, compute: int) -> Shape:
    """The passes of a run of one process."""
    training = recipe.training
    micro, eval_rows = training.per_device_train_batch_size, training.per_device_eval_batch_size
    if micro == "auto":
        micro = modest_micro_batch(training.global_batch_size, survey.cut_lengths)
    if eval_rows == "auto":
        eval_rows = modest_eval_batch(micro, survey.longest)
    found = fitting.shape_of(survey, (micro, training.global_batch_size, eval_rows), once, on_cpu, compute)
    return replace(found, recompute=training.activation_checkpointing is True)
