"""`hfstrat tune`: check and order the candidates, claim the folder, search; or join the search of another process."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from hfstrat.errors import UserError
from hfstrat.models.load import read_json
from hfstrat.run import output_dir
from hfstrat.tuning import results
from hfstrat.tuning.options import Advise, Options, Setting, check, ordered, resized
from hfstrat.tuning.screen import Screen
from hfstrat.tuning.search import Runner, Search
from hfstrat.tuning.store import LOCK

OPTIONS = "tune.options.json"
PREDICTED = ("evaluating", "finishing", "answering")  # seconds, in a setting
# seconds of the advisor's measuring, its share of the time, and the time from which on it measures
MEASURE, MEASURE_SHARE, MEASURE_FROM = 20.0, 0.04, 300.0


def tune(
    options: Options, advise: Advise, make_runner: Callable[[Path], Runner], clock: Callable[[], float] = time.time
) -> int:
    """Search until the deadline and leave the best model; returns the exit code.

    Args:
        options: the command line.
        advise: orders the candidates.
        make_runner: creates what runs the jobs, for a folder.
        clock: seconds, comparable between the processes of a search.

    Raises:
        UserError: a mistake, before anything is written.
        RunError: no candidate could be measured; or an interruption, after the best so far is finished.
    """
    began = clock()
    setting, screen = check(options), Screen()
    stored, identity = read_json(options.folder / OPTIONS), setting.identity()
    if stored and stored.get("identity") != identity:
        raise UserError(f"--output-dir: {options.folder} holds a search with other settings or data; choose another folder")
    if stored:
        setting = as_stored(setting, stored)
    else:
        spare = min(MEASURE, MEASURE_SHARE * options.time) if options.time >= MEASURE_FROM else 0.0
        advice = advise({entry.label: entry.loaded for entry in setting.entries}, spare)
        setting = ordered(setting, advice)
        screen.lines(advice.lines)
        if setting.unlikely:
            screen.lines([f"unlikely to be the best, and tried only if there is time for all: {', '.join(setting.unlikely)}"])
    lock = claim(options.folder)
    write_options(setting, identity)  # of a search that continues: its time may be another one
    try:
        return Search(setting, make_runner(options.folder), screen, clock, began).run()
    finally:
        lock.close()


def join(folder: Path, make_runner: Callable[[Path], Runner], clock: Callable[[], float] = time.time) -> int:
    """Work on a search that another process has started, on a folder that both see; returns when that one finishes.

    Raises:
        UserError: there is no such search.
    """
    stored = read_json(folder / OPTIONS)
    if not stored:
        raise UserError(f"--join: {folder} holds no search; start one there with hfstrat tune --output-dir {folder}")
    os.chdir(stored["cwd"])
    given = {**stored["options"], "search": tuple(stored["options"]["search"]), "output": str(folder)}
    setting = check(Options(**given))
    if stored["identity"] != setting.identity():
        raise UserError(f"--join: {folder}: its model or data differ from those on this machine")
    setting = as_stored(setting, stored)
    return Search(setting, make_runner(folder), Screen(), clock, clock(), leads=False).run()


def as_stored(setting: Setting, stored: dict[str, Any]) -> Setting:
    """The setting with what the advisor has decided at the start of the search."""
    setting = resized(setting, {label: own for label, own in stored.get("sized", {}).items() if label in stored["order"]})
    order = [setting.entry(label) for label in stored["order"]]
    lineup = replace(setting.lineup, entries=order, excluded=stored["excluded"])
    return replace(
        setting,
        lineup=lineup,
        most_rows=stored.get("most_rows"),
        warmups=stored.get("warmups", {}),
        unlikely=tuple(stored.get("unlikely", ())),
        **{name: stored.get(name, 0.0) for name in PREDICTED},
    )


def claim(folder: Path) -> IO[str]:
    """Create and lock the folder; one process leads a search. Raises UserError if one does already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"--output-dir: {folder} is in use by a running search; join it with hfstrat tune --join {folder}"
        ) from None
    (folder / output_dir.LOCK).touch()  # marks the folder of a run
    return lock


def write_options(setting: Setting, identity: str) -> None:
    """Store what another process, or the same command after a kill, has to know; proposed recipes become files."""
    folder = setting.options.folder
    for entry in setting.entries:
        if entry.text is not None:
            Path(entry.source).parent.mkdir(parents=True, exist_ok=True)
            Path(entry.source).write_text(entry.text, encoding="utf-8")
    stored = {
        "identity": identity,
        "order": [entry.label for entry in setting.entries],
        "excluded": setting.lineup.excluded,
        "most_rows": setting.most_rows,
        "warmups": dict(setting.warmups),
        "unlikely": list(setting.unlikely),
        "sized": dict(setting.sized),
        **{name: getattr(setting, name) for name in PREDICTED},
        "options": asdict(setting.options),
        "cwd": str(Path.cwd()),
    }
    results.write(folder / OPTIONS, json.dumps(stored, indent=1))
