"""`hfstrat compare`: line up, look at the rows, run what is not done yet, say what came out."""

from __future__ import annotations

import fcntl
import json
import shlex
import signal
from pathlib import Path
from typing import IO, Any

from hfstrat import __version__, errors
from hfstrat.comparison import entries as comparison_entries
from hfstrat.comparison import page, results, runs, survey
from hfstrat.comparison.entries import Asked, Line, line_up
from hfstrat.comparison.results import Predict
from hfstrat.comparison.runs import Ending, Run
from hfstrat.comparison.screen import Screen
from hfstrat.comparison.survey import Rows
from hfstrat.errors import RunError, UserError
from hfstrat.models.load import read_json
from hfstrat.recipe.load import load_recipe
from hfstrat.strategies.defaults import Prediction

LOCK = ".hfstrat.compare.lock"  # also what tells a comparison's folder from any other
DATA, PAGE, ROWS = "comparison.json", "report.html", "before.json"
BESIDE = (600.0, 3.0)  # of a budget of time a run may take so many seconds more than so many times it
OF_REPORT = ("python", "platform", "libraries", "processor", "threads", "gpus")


def compare(asked: Asked, predict: Predict) -> int:
    """Carry out a comparison; returns the exit code: 0 also where single runs failed, which stand in the table as that.

    Args:
        asked: the recipes and options.
        predict: what a run will need, before it is measured; must be quick and import no torch.

    Raises:
        UserError: a mistake, before anything is written or run.
        RunError: nothing came to its end, or it was interrupted; the same command goes on.
    """
    check_folder(asked.output)
    line = line_up(asked)
    check_made(line)
    screen = Screen()
    screen.remarks(asked, line)
    planned = plan(asked, line)
    endings = {run: runs.ending_of(run) for run in planned}
    if asked.retry:
        endings = {run: ending if ending and ending.is_done else None for run, ending in endings.items()}
    rows = known_rows(asked, planned)
    if rows is None:
        screen.say("looking at the rows")
        rows = survey.take(line, asked.budget, asked.seeds)
    planned = with_steps(asked, line, planned, rows)
    endings = dict(zip(planned, endings.values(), strict=True))
    said = foretold(asked, line, planned, predict)
    lock = claim(asked.output, line, planned, rows, said)
    whole = Comparison(asked, line, rows, said, endings)
    screen.begin(whole.table(), rows)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with screen.watching(planned, endings):
            for run in planned:
                if endings[run] is not None:
                    continue
                screen.starts(run)
                endings[run] = runs.carry_out(run, limit_of(asked), screen.look)
                screen.ended(run, endings[run], whole.table())
                whole.write()
    except KeyboardInterrupt:
        whole.write()
        done = sum(ending is not None for ending in endings.values())
        raise RunError(
            f"interrupted; {done} of {len(planned)} runs have ended and are kept, the same command goes on with the others",
            errors.INTERRUPTED,
        ) from None
    finally:
        lock.close()
    table = whole.write()
    screen.result(table, asked.output / PAGE)
    failed = [ending for ending in endings.values() if ending and not ending.is_done]
    if len(failed) == len(endings):
        first = failed[0]
        raise RunError(f"no run came to its end; the first: {first.status}: {first.sentence}", errors.CRASH)
    return errors.OK


def check_folder(folder: Path) -> None:
    """Refuse a folder that is something else.

    Raises:
        UserError: a file, or a folder with something in it that is no comparison.
    """
    folder = folder.expanduser()
    if folder.is_file():
        raise UserError(f"--output: {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).is_file():
        raise UserError(f"--output: {folder} is in use by something that is no comparison of hfstrat; name another folder")


def check_made(line: Line) -> None:
    """Never write over a recipe that was made here and then changed.

    Raises:
        UserError: one that would not be the same.
    """
    for entry in line.entries:
        file = Path(entry.source)
        if entry.text is not None and file.is_file() and file.read_text(encoding="utf-8") != entry.text:
            raise UserError(
                f"{file}: it was changed by hand, or made for another model or other data; to compare what is in it, give the "
                f"recipe files in place of --model and --data: hfstrat compare {file.parent}/*.yaml; or name another --output"
            )


def plan(asked: Asked, line: Line) -> list[Run]:
    """All runs, first each recipe with the first seed, then all with the next: an interruption leaves a fair table."""
    planned = []
    for index in range(asked.seeds):
        for entry in line.entries:
            folder = asked.output / entry.label / f"seed-{line.seed(index)}"
            words = line.words(entry, index, asked.budget, None, folder / runs.RESULT)
            loaded = load_recipe(entry.source, words, entry.text)
            same = comparison_entries.fingerprint(loaded, asked.budget)
            planned.append(Run(entry.label, line.seed(index), entry.source, tuple(words), folder, same))
    return planned


def known_rows(asked: Asked, planned: list[Run]) -> dict[str, Rows] | None:
    """What an earlier start of the same comparison saw of the rows (it stands beside what was predicted then)."""
    stored = read_json(asked.output / ROWS)
    if stored.get("runs") != [run.identity for run in planned]:
        return None
    return {label: Rows(**each) for label, each in stored["rows"].items()}


def with_steps(asked: Asked, line: Line, planned: list[Run], rows: dict[str, Rows]) -> list[Run]:
    """The runs with the steps that a budget of tokens is enough for."""
    if asked.budget.kind != "tokens":
        return planned
    found, entries = [], {entry.label: entry for entry in line.entries}
    for run in planned:
        index = run.seed - line.seed(0)
        words = line.words(entries[run.label], index, asked.budget, rows[run.label].steps[index], run.result)
        found.append(Run(run.label, run.seed, run.source, tuple(words), run.folder, run.identity))
    return found


def foretold(asked: Asked, line: Line, planned: list[Run], predict: Predict) -> dict[str, Prediction]:
    """What is predicted of each recipe with the first seed; what was said before a run is kept, as afterwards it is known."""
    first, stored = planned[: len(line.entries)], read_json(asked.output / ROWS).get("predicted", {})
    kept = {run.label: stored[run.identity] for run in first if stored.get(run.identity)}
    if len(kept) == len(first):
        return kept
    texts = {entry.label: entry.text for entry in line.entries}
    said = predict({run.label: load_recipe(run.source, run.words, texts[run.label]) for run in first})
    return {**said, **kept}


def claim(folder: Path, line: Line, planned: list[Run], rows: dict[str, Rows], said: dict[str, Prediction]) -> IO[str]:
    """Make the folder, lock it, and leave in it what the runs are made from.

    Raises:
        UserError: another comparison is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--output: {folder} is in use by a comparison that is going on; name another folder") from None
    for entry in line.entries:
        if entry.text is not None:
            Path(entry.source).parent.mkdir(exist_ok=True)
            Path(entry.source).write_text(entry.text, encoding="utf-8")
    stored = {
        "runs": [run.identity for run in planned],
        "rows": {label: vars(each) for label, each in rows.items()},
        "predicted": {run.identity: said.get(run.label, {}) for run in planned[: len(line.entries)]},
    }
    (folder / ROWS).write_text(json.dumps(stored, indent=1), encoding="utf-8")
    return lock


def limit_of(asked: Asked) -> float | None:
    """The seconds that one process gets."""
    if asked.timeout is not None or asked.budget.kind != "time":
        return asked.timeout
    return BESIDE[0] + BESIDE[1] * asked.budget.amount


class Comparison:
    """What is known so far, as comparison.json and report.html have it."""

    def __init__(
        self, asked: Asked, line: Line, rows: dict[str, Rows], said: dict[str, Prediction], endings: dict[Run, Ending | None]
    ) -> None:
        self.asked, self.line, self.rows, self.said, self.endings = asked, line, rows, said, endings
        self.task = line.entries[0].loaded.recipe.task
        self.quality = results.quality_of(self.task, len({each.tokenizer for each in rows.values()}))

    def table(self) -> dict[str, Any]:
        """Everything; the same runs always give the same numbers."""
        its_runs: dict[str, list[Run]] = {entry.label: [] for entry in self.line.entries}
        for run in self.endings:
            its_runs[run.label].append(run)
        done = {label: [run for run in of if (e := self.endings[run]) and e.is_done] for label, of in its_runs.items()}
        rows = [
            results.of_entry(
                entry,
                [results.of_run(run, self.endings[run], self.quality) for run in its_runs[entry.label]],
                self.said.get(entry.label),
            )
            for entry in self.line.entries
        ]
        found = results.put_side_by_side(rows, results.aligned(done, self.quality), self.quality)
        reports = {label: [runs.report_of(run) for run in of] for label, of in done.items() if of}
        first = next((several[0] for several in reports.values()), {})
        return {
            "hfstrat": __version__,
            "task": self.task,
            "quality": self.quality._asdict(),
            "budget": {"kind": self.asked.budget.kind, "amount": self.asked.budget.amount, "text": self.asked.budget.text},
            "seeds": [self.line.seed(index) for index in range(self.asked.seeds)],
            "rows": results.rows_facts(self.rows),
            **found,
            "entries": rows,
            "left_out": self.line.left_out,
            "samples": results.samples({label: several[0] for label, several in reports.items()}),
            "confusions": results.confusions(reports),
            "environment": {key: value for key, value in first.get("environment", {}).items() if key in OF_REPORT},
            "repeat": {"command": shlex.join(command_of(self.asked)), "folder": str(Path.cwd())},
        }

    def write(self) -> dict[str, Any]:
        """comparison.json and report.html, each in one move."""
        table = self.table()
        text = json.dumps(table, indent=1, ensure_ascii=False, default=str) + "\n"
        for name, content in ((DATA, text), (PAGE, page.render(table))):
            partial = self.asked.output / f"{name}.partial"
            partial.write_text(content, encoding="utf-8")
            partial.replace(self.asked.output / name)
        return table


def command_of(asked: Asked) -> list[str]:
    """The command line that was given."""
    given = {"model": asked.model, "data": asked.data, "strategies": asked.strategies, "task": asked.task}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += [f"--budget={asked.budget.text}", f"--seeds={asked.seeds}", f"--output={asked.output}"]
    options += [f"--evaluate={asked.evaluate}"] if asked.evaluate else []
    options += [f"--timeout={asked.timeout:g}s"] if asked.timeout else []
    return ["hfstrat", "compare", *asked.recipes, *asked.words, *options]
