"""`hfstrat advise`: what was given becomes a situation, a verdict, a table, recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hfstrat.advisor import data as rows_of
from hfstrat.advisor import hardware, recipes, shapes, show, speed, verdict
from hfstrat.advisor.candidates import names
from hfstrat.advisor.data import Survey
from hfstrat.advisor.shapes import Model
from hfstrat.advisor.verdict import Situation
from hfstrat.errors import UserError
from hfstrat.tasks import TASKS

GOALS = ("quality", "speed", "size")
RUNS = "runs"  # where the shipped recipes leave their runs
HAND_CONTEXT, HAND_VOCABULARY = 2048, 32_000


@dataclass(frozen=True)
class Asked:
    """The command line, as it was given."""

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
    measure: str | None = None
    reports: str | None = None
    parameters: str | None = None
    vocab: int | None = None
    rows: int | None = None
    tokens: int | None = None
    classes: int = 0


def advise(asked: Asked, folder: Path | None, as_json: bool) -> None:
    """Print the advice, and write recipes if a folder is named. Raises UserError."""
    situation = situation_of(asked)
    wanted = names(asked.strategies, situation.data.task)
    if asked.measure is not None:
        from hfstrat.advisor import measuring

        situation.measured = measuring.measure(situation, wanted, hardware.parse_time(asked.measure, "--measure"))
    advices = verdict.decide(situation, wanted)
    written = recipes.write(advices, situation, folder) if folder is not None else []
    if as_json:
        found = show.as_json(situation, advices) | {"recipes": [str(file) for file in written]}
        print(json.dumps(found, indent=1, default=str))
        return
    show.show(situation, advices)
    for advice in advices:
        if advice.refused:
            print(f"note      no recipe for {advice.name}: {advice.refused}")
    if folder is not None and not written:
        print("note      no recipe was written: there is none that fits")
    for file in written:
        print(f"recipe    {file} (hfstrat train {file})")
    if len(written) > 1:
        print(f"measure   them side by side: hfstrat compare {folder}/*.yaml --budget {asked.time or '10min'}")


def situation_of(asked: Asked) -> Situation:
    """Raises UserError for whatever cannot be: one sentence that begins with the option."""
    if asked.goal not in GOALS:
        raise UserError(f"--goal: {asked.goal}: expected one of {', '.join(GOALS)}")
    if asked.task is not None and asked.task not in TASKS:
        raise UserError(f"--task: {asked.task}: expected one of {', '.join(TASKS)}")
    device = hardware.find_device(asked.device)
    time = hardware.parse_time(asked.time) if asked.time else None
    sharing = hardware.read_sharing(asked.accelerate_config, asked.num_processes)
    parts = sharing.processes if device.is_cpu else 1  # of its memory and its cores
    limit = hardware.parse_memory(asked.memory) if asked.memory else device.memory / parts
    model = _model(asked)
    data = _data(asked, model)
    past = Path(asked.reports or RUNS).expanduser()
    if asked.reports and not past.is_dir():
        raise UserError(f"--reports: {asked.reports}: no such folder; name one below which runs have left their report.json")
    reports = speed.of_reports(past) if past.is_dir() else []
    rate = speed.rate_of(device, reports).of(model.width)
    if rate.value <= 0:
        raise UserError(f"--device: {device.name}: nobody knows how fast it is; name a known one by --device")
    rate = rate._replace(value=rate.value / parts, product=rate.product / parts)
    return Situation(model, data, device, limit, sharing, time, asked.goal, rate)


def _model(asked: Asked) -> Model:
    if asked.model is not None and asked.parameters is not None:
        raise UserError("--parameters: --model has a size of its own; give one of them")
    if asked.model is not None:
        if asked.vocab is not None:
            raise UserError("--vocab: --model has a vocabulary of its own; it goes with --parameters")
        return shapes.read(asked.model)
    if asked.parameters is None:
        raise UserError("--model: missing; give a model folder or a Hub id, or a size by hand: --parameters 1.1B")
    return shapes.by_hand(asked.parameters, asked.vocab or HAND_VOCABULARY, HAND_CONTEXT)


def _data(asked: Asked, model: Model) -> Survey:
    given = (asked.rows, asked.tokens)
    if asked.data is not None:
        if given != (None, None):
            raise UserError("--rows and --tokens: --data has rows of its own; give one of them")
        if asked.classes:
            raise UserError("--classes: --data has labels of its own; it goes with --rows and --tokens")
        return rows_of.survey(asked.data, model, asked.task)
    if asked.rows is None or asked.tokens is None:
        raise UserError("--data: missing; give a file of rows, or their number by hand: --rows 10000 --tokens 2000000")
    task = asked.task or ("text-classification" if asked.classes else "causal-lm")
    return rows_of.by_hand(asked.rows, asked.tokens, task, asked.classes, model.context)
