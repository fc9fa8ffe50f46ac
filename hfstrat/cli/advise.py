"""`hfstrat advise`: options in, a situation, advice, a table, recipes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfstrat.advisor import architecture, decide, files, hardware, measure, measured_runs, recipes, show, speed, towers
from hfstrat.advisor import data as training_data
from hfstrat.advisor.architecture import Model
from hfstrat.advisor.data import Survey
from hfstrat.advisor.decide import Situation
from hfstrat.advisor.file_survey import survey_files, survey_image_texts
from hfstrat.engine.entries import check_not_streamed
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_data
from hfstrat.recipe.schema import STRATEGIES
from hfstrat.strategies import defaults
from hfstrat.tasks import TASKS, Task

GOALS = ("quality", "speed", "size")
RUNS = "runs"  # where the bundled recipes write their runs
MEASURING = 20.0  # seconds, unless --measure says otherwise
SECTIONS = ("data.", "image.", "audio.")  # of a recipe, whose keys can be set
CONTEXT, VOCABULARY = 2048, 32_000  # of a model given only by its size


@dataclass(frozen=True)
class Request:
    """The options of the command line."""

    model: str | None = None
    data: str | None = None
    task: str | None = None
    memory: str | None = None
    time: str | None = None
    device: str = "auto"
    accelerate_config: str | None = None
    num_processes: int | None = None
    goal: str = "quality"
    strategies: str | None = None
    measure: str | None = None  # a time, auto, or None: not at all
    reports: str | None = None
    parameters: str | None = None
    vocab: int | None = None
    rows: int | None = None
    tokens: int | None = None
    classes: int = 0
    overrides: tuple[str, ...] = ()  # `data.KEY=VALUE`


def advise(request: Request, folder: Path | None, as_json: bool) -> None:
    """Print advice, and write recipes if a folder is given. Raises UserError."""
    situation = situation_of(request)
    names = strategies_of(request.strategies, situation.data.task)
    situation, remark = measured(situation, names, request.measure)
    advice = decide.decide(situation, names)
    written = recipes.write(advice, situation, folder) if folder is not None else recipes.Written([], {})
    if as_json:
        answer = show.as_json(situation, advice) | {"recipes": [str(file) for file in written.files]}
        print(json.dumps(answer, indent=1, default=str))
        return
    show.show(situation, advice)
    if remark:
        print(f"note      {remark}")
    for name, reason in written.rejected.items():
        print(f"note      no recipe for {name}: {reason}")
    if folder is not None and not written.files:
        print("note      no recipe written: no strategy fits into the given memory")
    for file in written.files:
        print(f"recipe    {file} (hfstrat train {file})")
    if len(written.files) > 1:
        print(f"compare   measure them side by side: hfstrat compare {folder}/*.yaml --budget {request.time or '10min'}")


def measured(situation: Situation, names: Sequence[str], wanted: str | None) -> tuple[Situation, str]:
    """The situation with what was measured, and a remark where that was not possible.

    Args:
        wanted: a time; auto: a short one, where it is possible; None: not at all.
    """
    if wanted is None:
        return situation, ""
    if wanted != "auto":
        limit = hardware.parse_time(wanted, "--measure")
        return replace(situation, measured=measure.measure(situation, names, limit)), ""
    if (reason := measure.obstacle(situation)) is not None:
        return situation, f"nothing was measured: {reason}"
    try:
        return replace(situation, measured=measure.measure(situation, names, MEASURING)), ""
    except UserError as error:  # the measured runs still have an answer
        return situation, f"nothing was measured: {str(error).removeprefix('--measure: ')}"


def strategies_of(text: str | None, task: str) -> Sequence[str]:
    """The strategies to rank. Raises UserError for a strategy that does not support the task."""
    if text is None:
        return defaults.ORDER
    names = defaults.parse_names(text)
    for name in names:
        if task not in STRATEGIES[name].tasks:
            able = ", ".join(other for other in defaults.ORDER if task in STRATEGIES[other].tasks)
            raise UserError(f"--strategies: {name} does not support task {task}; expected some of {able}")
    return names


def situation_of(request: Request) -> Situation:
    """What the options describe. Raises UserError for a wrong option; the message begins with its name."""
    if request.goal not in GOALS:
        raise UserError(f"--goal: {request.goal}: expected one of {', '.join(GOALS)}")
    if request.task is not None and request.task not in TASKS:
        raise UserError(f"--task: {request.task}: expected one of {', '.join(TASKS)}")
    device = hardware.find_device(request.device)
    time = hardware.parse_time(request.time) if request.time else None
    sharing = hardware.read_sharing(request.accelerate_config, request.num_processes)
    parts = sharing.processes if device.is_cpu else 1  # processes on a CPU share its memory and its cores
    limit = hardware.parse_memory(request.memory) if request.memory else device.memory / parts
    task = _task_of_files(request)
    model = _model(request, task)
    data = _data(request, model, task)
    past = Path(request.reports or RUNS).expanduser()
    if request.reports and not past.is_dir():
        raise UserError(f"--reports: {request.reports}: no such folder; give one that contains finished runs (report.json)")
    reports = speed.rates_of_reports(past) if past.is_dir() else []
    own = tuple(measured_runs.of_reports(past)) if past.is_dir() else ()
    rate = speed.rate_of(device, reports)
    if rate.value <= 0:
        raise UserError(f"--device: {device.name}: its speed is unknown; give a similar GPU with --device, and set --memory")
    rate = rate._replace(value=rate.value / parts, product=rate.product / parts)
    quantizes = importlib.util.find_spec("bitsandbytes") is not None
    runs = (*measured_runs.shipped(), *own)
    return Situation(model, data, device, limit, sharing, time, request.goal, rate, quantizes, runs=runs)


def _task_of_files(request: Request) -> Task | None:
    """The task of images or recordings; None for texts. Raises UserError."""
    _check_overrides(request)
    if request.data is None:
        wanted = TASKS.get(request.task or "")
        if wanted is not None and (wanted.rows.kind or wanted.model.sees_images):
            raise UserError(f"--task: {wanted.name}: sizes by hand are for texts; give --data")
        return None
    section = load_data(request.data, request.overrides).recipe.data
    found = files.task_of(section, request.task)
    if found is None and (odd := next((each for each in request.overrides if not each.startswith("data.")), None)):
        raise UserError(f"advise: {odd}: it is for images or recordings, and {request.data} has texts; remove it")
    return found


def _check_overrides(request: Request) -> None:
    for override in request.overrides:
        if not override.startswith(SECTIONS) or request.data is None:
            raise UserError(
                f"advise: {override}: only keys of the section data can be set here, together with --data, such as "
                "'data.columns={review: text}'; for images also image.image_size, for recordings audio.max_length"
            )


def _model(request: Request, task: Task | None) -> Model:
    if request.model is not None and request.parameters is not None:
        raise UserError("--parameters: --model already has a size; remove one of the two options")
    if request.model is not None:
        if request.vocab is not None:
            raise UserError("--vocab: --model already has a vocabulary; use --vocab only with --parameters")
        if task is not None and task.rows.kind is None:
            return towers.read(architecture.read(request.model))
        return architecture.read(request.model, task)
    if request.parameters is None:
        raise UserError("--model: missing; give a model folder, a Hub id, or only a size: --parameters 1.1B")
    if task is not None:
        raise UserError(f"--parameters: sizes by hand are for models of text; give --model for task {task.name}")
    return architecture.by_hand(request.parameters, request.vocab or VOCABULARY, CONTEXT)


def _data(request: Request, model: Model, task: Task | None) -> Survey:
    if request.data is not None:
        if request.rows is not None or request.tokens is not None:
            raise UserError("--rows and --tokens: --data already has rows; use them only without --data")
        if request.classes:
            raise UserError("--classes: --data already has labels; use --classes only with --rows and --tokens")
        recipe = load_data(request.data, request.overrides, task.name if task is not None else None).recipe
        section = recipe.data
        check_not_streamed(section)
        if section.train[0].path != request.data:
            raise UserError("data.train: --data already sets it; remove one of the two")
        if model.tower is not None and task is not None:
            named = recipe.model.model_copy(update={"name_or_path": str(model.folder or model.name)})
            return survey_image_texts(section, task, model, recipe.model_copy(update={"model": named}))
        if task is not None:
            return survey_files(section, task, model, recipe)
        return training_data.survey(section, request.task, model.context, model.folder)
    if request.rows is None or request.tokens is None:
        raise UserError("--data: missing; give a file, a folder, or only numbers: --rows 10000 --tokens 2000000")
    name = request.task or ("text-classification" if request.classes else "causal-lm")
    return training_data.by_hand(request.rows, request.tokens, name, request.classes, model.context)
