"""Recipes and the advisor: writing those of the best strategies, and predicting those that exist. No torch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hfstrat import strategies
from hfstrat.advisor import architecture, data, decide, expected, generation, hardware, memory, speed, towers
from hfstrat.advisor.architecture import Model
from hfstrat.advisor.candidates import Candidate
from hfstrat.advisor.data import Survey
from hfstrat.advisor.decide import Advice, Fitted, Scored, Situation, Timed
from hfstrat.advisor.file_survey import survey_files, survey_image_texts
from hfstrat.advisor.hardware import Device
from hfstrat.advisor.memory import Shape
from hfstrat.advisor.speed import Rate
from hfstrat.data import sources
from hfstrat.errors import UserError, first_line
from hfstrat.models import families, transformers_source
from hfstrat.recipe.load import Loaded, load_recipe
from hfstrat.recipe.schema import OBJECTIVES, Recipe
from hfstrat.recipe.section import seconds
from hfstrat.run import preflight
from hfstrat.strategies import defaults
from hfstrat.strategies.defaults import Prediction
from hfstrat.tasks import TASKS, Task
from hfstrat.trainer.plan import modest_eval_batch, modest_micro_batch

WRITTEN = 3  # recipes, where no quality is predicted
AFTER_TRAINING = speed.START_SECONDS * 0.4  # the part of the start-up time that follows training: verifying the result


@dataclass(frozen=True)
class Written:
    """The recipe files, and the strategies whose recipe failed its checks, with the reason."""

    files: list[Path]
    rejected: dict[str, str]


def write(advice: Advice, situation: Situation, folder: Path) -> Written:
    """Write the recipe of the winner, and of every strategy within its interval, that fit into memory.

    Where no quality is predicted, the first three are written. No folder is created if nothing fits.

    Raises:
        UserError: sizes given by hand, `folder` is a file, or it contains recipes already.
    """
    if situation.model.by_hand or situation.data.by_hand:
        raise UserError("--write: a recipe needs a model and data; give --model and --data instead of sizes")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--write: {folder} is a file; expected a folder")
    if existing := sorted(folder.glob("*.yaml")):
        raise UserError(f"--write: {existing[0]} exists already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    files, rejected = list[Path](), dict[str, str]()
    for place, scored in chosen(advice):
        file = folder / f"{len(files) + 1}-{scored.name}.yaml"
        file.write_text(text_of(scored, place, situation), encoding="utf-8")
        try:
            preflight.check(load_recipe(str(file)), network=False)
        except UserError as error:  # such as too little text for a new tokenizer
            file.unlink()
            rejected[scored.name] = str(error)
        else:
            files.append(file)
    if not files:
        folder.rmdir()
    return Written(files, rejected)


def chosen(advice: Advice) -> list[tuple[int, Scored]]:
    """Place and strategy of those whose recipes are written: on this machine, or else on more processes."""
    possible = [(place, each) for place, each in enumerate(advice.ranked, 1) if each.fitted.kind != "does not fit"]
    here = [(place, each) for place, each in possible if each.fitted.fits_here] or possible
    if not here or here[0][1].expected.value is None:
        return here[:WRITTEN]
    first = here[0][1]
    if all(each.expected.value is None for _, each in here[1:]):  # they may be better
        return here[:WRITTEN]
    return [(place, each) for place, each in here if each is first or each.expected.reaches(first.expected)]


def text_of(scored: Scored, place: int, situation: Situation) -> str:
    """The recipe of a strategy as YAML, with what is expected of it in the first line."""
    comment = f"{scored.name}, number {place} of `hfstrat advise`: {scored.expected.words()}."
    training: dict[str, Any] = {"num_train_epochs": scored.candidate.epochs}
    stops_early = scored.timed.words and scored.timed.work.training
    if situation.time is not None and stops_early:  # the limit includes more than training
        training = {"max_time": f"{max(1.0, situation.time - speed.START_SECONDS):.0f}s"}
    return defaults.recipe_text(comment, recipe_of(scored.fitted, situation, training))


def recipe_of(fitted: Fitted, situation: Situation, training: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a strategy; keys that are not set keep their defaults.

    Args:
        fitted: the strategy.
        situation: the model and the data.
        training: keys of `training:` that set the length of the run.
    """
    candidate = fitted.candidate
    survey = situation.given_to(candidate).data
    recipe: dict[str, Any] = {"task": survey.task}
    if candidate.strategy.needs_weights:
        name = absolute_path(situation.model.name)
        recipe["model"] = name if fitted.shape.frozen is None else {"name_or_path": name, "quantization": "nf4"}
    recipe["strategy"] = candidate.section
    recipe["data"] = data_of(survey)
    recipe |= survey.sections
    rate = defaults.learning_rate(candidate.name, candidate.model.width)
    if survey.objective != "sft":
        recipe["objective"], share = survey.objective, OBJECTIVES[survey.objective].rate
        rate = None if rate is None or share is None else float(f"{rate * share.value:.3g}")
    elif not survey.outputs and survey.cut_share:
        recipe["data"].setdefault("overflow", "split")
    recipe["training"] = {**training, **({} if rate is None else {"learning_rate": rate}), **fitted.settings}
    return {**recipe, "output_dir": f"runs/advised-{candidate.name}"}


def data_of(survey: Survey) -> dict[str, Any]:
    """The section `data` of a recipe for these examples."""
    given = survey.settings.items()
    paths = {key: absolute_path(value) for key, value in given if key in ("eval", "template") and isinstance(value, str)}
    length = {} if survey.files is not None else {"max_length": survey.max_length}
    return {"train": absolute_path(survey.source), **length, **survey.settings, **paths}


def absolute_path(name: str) -> str:
    """A local path made absolute (links are not resolved), so that the recipe works anywhere; a Hub id stays as it is."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else name


def predict(recipes: Mapping[str, Loaded], rate: Rate | None = None) -> dict[str, Prediction]:
    """Predict each recipe by its name, in well under a second each (with images in texts once some seconds); one that cannot be
    predicted is left out.

    Args:
        recipes: by name.
        rate: of this machine, if it is known.
    """
    predictions: dict[str, Prediction] = {}
    merits: dict[str, float] = {}
    rate = rate or speed.rate_of(hardware.find_device("auto"))  # once: on a busy machine it is measured, and not stored
    for name, loaded in recipes.items():
        with contextlib.suppress(UserError):
            predictions[name], merits[name] = predict_one(loaded.recipe, rate)
    ranked = [name for name in merits if math.isfinite(merits[name])]
    for place, name in enumerate(sorted(ranked, key=lambda name: -merits[name]), 1):
        predictions[name]["rank"] = place
    return predictions


NO_RATE = "the time, since the speed of this machine was not measured yet; `hfstrat advise` measures and stores it"
REMOTE = "anything, since the model or the data are not on this machine, or are streamed"


def before_run(loaded: Loaded) -> dict[str, Any]:
    """The prediction for a run that is about to start, in about a second; with a `reason` for what is not predicted.

    With images in texts it takes some seconds, since the model's processor is run.

    Nothing is downloaded and no machine is timed for it, and no failure of it ends the run.
    """
    recipe = loaded.recipe
    if not TASKS[recipe.task].model.has_predicted_costs:
        return {"reason": f"memory and time of task {recipe.task} are not predicted in this version"}
    model = recipe.model.name_or_path
    here = all(sources.is_local(source.path) for source in recipe.data.train) and not recipe.data.streaming
    if not here or (model and not Path(model).expanduser().exists()):
        return {"reason": REMOTE}
    device = hardware.find_device("auto")
    rate = speed.stored_rate() if device.is_cpu else speed.rate_of(device)
    try:
        found: dict[str, Any] = dict(predict_one(recipe, rate or Rate(speed.ASSUMED, ""))[0])
    except UserError as error:
        return {"reason": first_line(error)}
    except Exception as error:  # a prediction is not worth a run
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}
    found["source"] = f"the model's shapes and the data{f'; {rate.source}' if rate else ''}"
    if rate is None:
        found = {key: value for key, value in found.items() if not key.startswith("seconds")} | {"reason": NO_RATE}
    return found


def predict_one(recipe: Recipe, rate: Rate, device: Device | None = None) -> tuple[Prediction, float]:
    """The prediction for a recipe without its rank, and its merit: higher is better, minus infinity is unknown.

    Args:
        rate: of the device.
        device: default: that of this machine.

    Raises:
        UserError: it cannot be predicted.
    """
    candidate, survey = candidate_of(recipe)
    device = device or hardware.find_device("auto")
    situation = Situation(candidate.model, survey, device, device.memory, rate=rate)
    shape = shape_of_recipe(recipe, survey, candidate.description.body_once, device.is_cpu, situation.compute)
    fitted = Fitted(candidate, "fits", "", memory.predict(candidate.model, candidate.description, shape), shape, {})
    timed = estimate(recipe, fitted, situation)
    quality = expected.expect([decide.plan_of(timed, survey, recipe.training.global_batch_size)], situation.known)[0]
    predicted: Prediction = {"memory_bytes": fitted.peak, "seconds": timed.seconds}
    is_validated = survey.generation is None and device.is_cpu
    if (band := hardware.memory_band(survey.files is None, survey.pictures is not None)) is not None and is_validated:
        reach = band.worst * fitted.prediction.total
        predicted["memory_band"] = (fitted.peak - reach, fitted.peak + reach)
    if timed.band is not None:
        predicted["seconds_band"] = (timed.seconds / (1 + timed.band), timed.seconds * (1 + timed.band))
    predicted["verdict"] = quality.words()
    predicted["source"] = quality.basis
    if quality.value is not None:
        predicted["quality"] = quality.value
        predicted["quality_band"] = (quality.low or 0.0, quality.high or 0.0)
    return predicted, quality.merit


def estimate(recipe: Recipe, fitted: Fitted, situation: Situation) -> Timed:
    """The time of a recipe from the start to trained weights, and the epochs within it."""
    training, candidate, survey = recipe.training, fitted.candidate, situation.data
    is_cpu, batch = situation.device.is_cpu, training.global_batch_size
    answers, prompt = survey.generation, survey.prompt_length
    epochs = training.num_train_epochs or (training.max_steps or 0) * training.global_batch_size / survey.rows
    work = decide.work_of(candidate, survey, fitted.shape.recompute, epochs or None)
    rate = decide.rate_for(fitted, situation, work)
    rate = generation.with_answers(rate, candidate.model, answers, prompt, batch, is_cpu)
    answering = generation.evaluation_seconds(situation.eval_rows, candidate.model, answers, prompt, rate, is_cpu)
    count, rows = situation.evaluations, situation.eval_rows
    total = speed.seconds(work, survey.tokens, survey.rows / batch, epochs, situation.eval_tokens, count, rate)
    total += decide.reading_seconds(work, survey, rows, epochs, count, situation.has_measured_steps)
    total += count * answering
    limit = seconds(training.max_time) if training.max_time else None
    timed = Timed(fitted, work, total - AFTER_TRAINING, epochs, band=rate.band)
    if limit is not None and work.training:
        per_step = rate.fixed + (work.training / rate.value + rate.token) * survey.mean_length * batch
        possible = limit / per_step * batch / survey.rows
        timed = replace(timed, seconds=limit + speed.START_SECONDS - AFTER_TRAINING, epochs=possible)
    return timed


def candidate_of(recipe: Recipe) -> tuple[Candidate, Survey]:
    """The recipe's own strategy and data. Raises UserError for what cannot be read without torch."""
    if recipe.training.packing == "dense":
        raise UserError("training.packing: dense: the number of steps depends on the tokenized data, and is not predicted")
    if recipe.image.views > 1:
        raise UserError(f"image.views: {recipe.image.views}: memory and time of several views are not predicted")
    task, strategy, model = TASKS[recipe.task], recipe.strategy, _model(recipe)
    if model.tower is not None:
        survey = survey_image_texts(recipe.data, task, model, recipe, proposes=False)
    elif model.reads_files:
        survey = survey_files(recipe.data, task, model, recipe, proposes=False)
    else:
        survey = survey_texts(recipe, model)
    plain = model.by_hand and not model.reads_files
    known = (model.shapes, model.tied) if plain else architecture.parameters_of(model, task, survey.outputs)
    if known is None:
        raise UserError(f"model.name_or_path: {recipe.model.name_or_path}: its parameter shapes are unknown without torch")
    section, built = strategy.model_dump(exclude_unset=True), strategies.build(strategy)
    built.set_family(model.family, task.text.generates)
    description = towers.describe(built, model, *known)
    if recipe.objective.name != "sft" or survey.generation is not None:
        description = description._replace(keeps_prefix=False)  # states of pairs, and of answers that change, are not cached
    return Candidate(strategy.name, section, strategy, model, description), survey


def survey_texts(recipe: Recipe, model: Model) -> Survey:
    """The examples of a recipe as it trains on them: with the answers that it samples for rewards."""
    objective, answers = recipe.objective, generation.of_recipe(recipe)
    prompts_for = objective.name if objective.generates else ""
    found = data.survey(recipe.data, recipe.task, model.context, model.folder, prompts_for)
    found = replace(found, max_length=min(recipe.data.max_length, model.context), objective=objective.name)
    if answers is None:
        return found
    prompts = np.minimum(found.lengths, found.max_length)
    if not answers.is_rewarded:  # the rows have answers too, which are not read
        prompts = np.maximum(1, np.round(prompts * (1 - found.supervised_share)).astype(np.int64))
    lengths = answers.lengths(prompts)
    share = answers.answers * answers.tokens / float(lengths.mean())
    return replace(found, lengths=lengths, supervised_share=share, generation=answers)


def _model(recipe: Recipe) -> Model:
    size, tokenizer, task = recipe.strategy.size, recipe.strategy.new_tokenizer, TASKS[recipe.task]
    if task.rows.kind is not None:
        return _of_files(recipe, task)
    if task.model.sees_images:  # in texts
        return towers.read(architecture.read(recipe.model.name_or_path))
    if size is None:
        return architecture.read(recipe.model.name_or_path)
    return architecture.by_hand(str(size), tokenizer.vocab_size if tokenizer else 32_000, recipe.data.max_length)


def _of_files(recipe: Recipe, task: Task) -> Model:
    """The model of a task whose examples are files. Raises UserError where it cannot be predicted."""
    if not task.model.has_predicted_costs:
        raise UserError(f"task: {task.name}: memory and time are not predicted: {task.model.costs_unknown}")
    if recipe.strategy.needs_weights:
        return architecture.read(recipe.model.name_or_path, task)
    if (made := strategies.build(recipe.strategy).new_config(recipe)) is None:
        raise UserError(f"strategy: {recipe.strategy.name}: the shapes of its model are unknown without torch")
    family, settings = made
    shapes = families.shapes_of(family, settings) or {}
    config = {**transformers_source.config_keys(family), **settings, "model_type": family}
    return architecture.from_config(f"a new {family}", config, shapes, 0, task=task)


def shape_of_recipe(recipe: Recipe, survey: Survey, once: bool, on_cpu: bool, compute: int) -> Shape:
    """The batches of a run of one process."""
    training = recipe.training
    micro, eval_rows = training.per_device_train_batch_size, training.per_device_eval_batch_size
    if micro == "auto":
        micro = modest_micro_batch(training.global_batch_size, survey.cut_lengths)
    if eval_rows == "auto":
        eval_rows = modest_eval_batch(micro, survey.longest)
    shape = decide.shape_of(survey, (micro, training.global_batch_size, eval_rows), once, on_cpu, compute)
    return replace(shape, recompute=training.activation_checkpointing is True)
