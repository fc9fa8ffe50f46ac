"""A search in one process: one decision after the other, until the time is over; then the winner is finished.

Everything that `Search.step` decides on is in the study. So a search that is killed makes the decision again, with the results
that are stored.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hfstrat import errors
from hfstrat.errors import RunError
from hfstrat.models.load import read_json
from hfstrat.objectives import task_of
from hfstrat.recipe import format
from hfstrat.tasks import report
from hfstrat.trainer import checkpoints
from hfstrat.trainer.plan import ENDLESS
from hfstrat.tuning import choosing, page, recipes, results, schedule, space
from hfstrat.tuning.options import CONTROL_ROWS, Setting
from hfstrat.tuning.schedule import Candidates, Next, Rung, Trial
from hfstrat.tuning.screen import Screen
from hfstrat.tuning.store import Store

TRIALS, FINAL = "trials", "final"
RESERVE = 1.15  # of the predicted time of the final run
FIRST_RESERVE, LOADING = 16.0, 6.0  # seconds of the final run and of a new process, before one is measured
SAVING = 3.0  # seconds: of the checkpoint, the result and the report
VERIFYING = 1.5  # of the time that the libraries take to load: a new process that also loads the result and compares
GRACE = 0.04  # of the time by which a rung may end late before it is stopped
PAUSE = 0.5  # seconds until a process that waits for others looks again


class Runner(Protocol):
    """What runs the jobs: `hfstrat.tuning.runner.Runner`, or a simulation."""

    ready: float  # seconds of a new process until its libraries are loaded; 0: not measured yet

    def start(self) -> None: ...
    def run(self, file: Path, result: Path, look: Callable[[], None]) -> dict[str, Any]: ...
    def close(self) -> None: ...


def after_training(rung: Rung) -> float:
    """Seconds of a job after its last step: saving, evaluation."""
    return rung.fixed - float(rung.info.get("setup", 0.0)) + float(rung.info.get("saving", 0.0))


class OutOfTime(Exception):
    """The deadline allows no more than the final run."""


class Search:
    """A search in one process.

    Args:
        setting: what is searched.
        runner: runs the jobs.
        screen: the terminal.
        clock: seconds.
        began: the start of the command on that clock.
        leads: whether this process keeps the time and finishes the winner.
    """

    def __init__(
        self, setting: Setting, runner: Runner, screen: Screen, clock: Callable[[], float], began: float, leads: bool = True
    ) -> None:
        self.setting, self.runner, self.screen, self.clock, self.leads = setting, runner, screen, clock, leads
        self.folder, self.seed = setting.options.folder, setting.options.seed
        self.runner.start()
        self.store = Store(self.folder, self.seed)
        recipe = setting.entries[0].loaded.recipe
        self.quality = choosing.quality_of(recipe, setting.in_bytes)
        self.has_control = recipe.evaluation.control != "off" and task_of(recipe).text.generates
        at_once = tuple(entry.label for entry in setting.entries if entry.at_once)
        others = tuple(entry.label for entry in setting.entries if not entry.at_once)
        stepwise = not any(entry.loaded.recipe.strategy.is_solved for entry in setting.entries)
        fixed = Candidates.fixed + setting.evaluating
        self.candidates = Candidates(at_once, others, setting.can_vary, fixed, stepwise, setting.unlikely)
        if leads:
            measured = (rung.at for trial in self.store.trials() for rung in trial.rungs)
            before = max([*measured, float(self.store.get("spent", 0.0))])
            self.store.put("session", {"began": began, "before": before})

    # time

    @property
    def elapsed(self) -> float:
        """Seconds of the search, over all its sessions; what a kill made vain does not count."""
        session = self.store.get("session")
        return float(session["before"]) + self.clock() - float(session["began"])

    def credit(self, seconds: float) -> None:
        """Count the seconds of a job whose answer was found after a kill."""
        session = self.store.get("session")
        self.store.put("session", {**session, "before": session["before"] + seconds})

    def left(self, trials: list[Trial]) -> float:
        """Seconds until the final run has to start."""
        return self.setting.options.time - self.elapsed - self.reserve(trials)

    def reserve(self, trials: list[Trial]) -> float:
        """Seconds for the final run: loading, evaluation, saving, verification in a new process, other data."""
        measured = [self.finishing(trial, trial.rungs[trial.best]) for trial in trials if trial.rungs]
        return max(measured, default=FIRST_RESERVE + self.setting.finishing + self.setting.answering)  # any of them may win

    @property
    def completing(self) -> float:
        """Seconds that a candidate trained as the final run needs after training, before anything is measured."""
        ready = float(self.store.get("ready", 0.0)) or LOADING
        again = VERIFYING * ready if self.setting.others is not None else 0.0  # the result is loaded and measured on other rows
        setting = self.setting
        measured = setting.evaluating + setting.finishing + setting.answering
        return RESERVE * (measured + VERIFYING * ready + again) + SAVING

    def finishing(self, trial: Trial, rung: Rung) -> float:
        """Seconds of the final run of a trial: the control text, answers to show and other rows are not measured before."""
        setup, evaluated, cached = (float(rung.info.get(name, 0.0)) for name in ("setup", "evaluated", "cached"))
        ready, loading = float(self.store.get("ready", 0.0)) or LOADING, setup - cached
        row = float(rung.info.get("row_seconds", max(0.0, rung.fixed - setup) / max(1, int(rung.info.get("held_out", 100)))))
        saved = max(0.0, rung.fixed - setup - evaluated) + float(rung.info.get("saving", 0.0))
        if trial.is_complete:  # it is solved and evaluated again, on features that are cached by now
            saved += rung.trained + evaluated
        control = CONTROL_ROWS * row if self.has_control else 0.0
        others = loading + self.setting.other_rows * row if self.setting.others is not None else 0.0
        return RESERVE * (loading + control + self.setting.answering + saved + VERIFYING * ready + others) + 1.0

    # the loop

    def run(self) -> int:
        """Search, then finish the winner."""
        if self.leads and self.store.get("finished") and report.status(self.folder) == "done":
            if self.left(self.store.trials()) < schedule.LEAST_SECONDS:
                self.screen.lines([self.is_over()])
                self.runner.close()
                return errors.OK
            self.store.reopen()
        self.screen.begin(self.setting, self.candidates, self.elapsed)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        interrupted = False
        try:
            try:
                while self.step():
                    pass
            except OutOfTime:
                pass
            except KeyboardInterrupt:
                interrupted = True
                self.screen.lines(["interrupted: finishing the best model so far (press Ctrl-C again to end immediately)"])
            if not self.leads:
                return errors.INTERRUPTED if interrupted else errors.OK
            self.finish(interrupted)
        finally:
            self.screen.close()
            self.runner.close()
        if interrupted:
            raise RunError(
                f"interrupted; the best model so far is in {self.folder}, verified; the same command continues the search",
                errors.INTERRUPTED,
            )
        return errors.OK

    def is_over(self) -> str:
        spent = float(self.store.get("spent", 0.0))
        return (
            f"this search has finished after {format.duration(spent)}; its result is in {self.folder}: give a longer --time to "
            "extend it, or choose another --output-dir for a new one"
        )

    def step(self) -> bool:
        """Make one decision and carry it out; False at the end of the search."""
        with self.store.locked():
            self.store.finish_asking(self.suggest)
            trials = self.store.trials()
            if not self.leads and (self.store.get("finished") or self.left(trials) <= 0):
                return False
            action = schedule.decide(self.candidates, trials, self.store.brackets(), self.left(trials))
            if action.do == "open":
                assert action.opened is not None
                self.store.open_bracket(action.opened)
            elif action.do == "new":
                self.store.ask(action.bracket, self.defaults(action), self.suggest, self.promising(trials))
            elif action.do == "train":
                self.store.claim(action.trial)
        if action.do == "train":
            try:
                self.train(action)
            finally:
                self.store.release(action.trial)
        elif action.do == "wait":
            self.screen.look(self.elapsed)
            time.sleep(PAUSE)
        return action.do != "stop"

    def promising(self, trials: list[Trial]) -> list[str]:
        """The strategies that the sampler may propose: all but those whose every trial has failed."""
        broken = {
            label
            for label in self.candidates.others
            if (own := [trial for trial in trials if trial.label == label]) and all(trial.failed for trial in own)
        }
        return [label for label in self.candidates.others if label not in broken] or list(self.candidates.others)

    def defaults(self, action: Next) -> dict[str, Any] | None:
        """The parameters of a strategy as its recipe has them; None: the sampler proposes."""
        if action.label is None:
            return None
        return space.defaults(self.setting.options.search, self.setting.entry(action.label))

    def suggest(self, trial: Any, labels: Any) -> None:
        """Suggest the parameters of a trial, whose strategy is one of some labels."""
        space.suggest(trial, self.setting.options.search, self.setting.entries, labels)

    # jobs

    def place(self, trial: int, rung: int) -> Path:
        return self.folder / TRIALS / f"{trial:03d}" / f"rung-{rung}"

    def train(self, action: Next) -> None:
        """Train a trial for a rung and store the result."""
        trial = next(trial for trial in self.store.trials() if trial.number == action.trial)
        folder, params = self.place(trial.number, action.rung), self.store.params(trial.number)
        file, result = folder.with_suffix(".job.json"), folder.with_suffix(".result.json")
        if not file.is_file():  # otherwise it was started before a kill, for the same seconds
            start = self.trunk(trial, action.rung - 1) if action.rung else None
            entry, settings = self.setting.entry(trial.label), space.overrides(params)
            if action.is_direct:
                overrides = recipes.final(self.setting, entry, settings, self.folder, (ENDLESS, 1))
                self.write_job(
                    file, result, trial.label, overrides, kind="direct", choosing=1.0, seconds=self.setting.options.time
                )
            else:
                overrides = recipes.rung(self.setting, entry, settings, folder, start)
                self.write_job(file, result, trial.label, overrides, kind="rung", seconds=action.seconds)
        self.limit_job(file, trial, action.is_direct)
        known = result.is_file()
        self.screen.starts(trial, params, action, self.elapsed)
        answer = self.runner.run(file, result, lambda: self.look(trial.number))
        if known:
            self.credit(float(answer.get("seconds", 0.0)))
        if self.runner.ready:
            self.store.put("ready", self.runner.ready)
        if answer["status"] != errors.NAMES[errors.OK]:
            if answer.get("code") == errors.INTERRUPTED or answer["status"] == errors.NAMES[errors.INTERRUPTED]:
                return
            self.store.fail(trial.number, str(answer["sentence"]))
            self.screen.failed(trial, str(answer["sentence"]))
            return
        self.record(trial, action, answer)

    def limit_job(self, file: Path, trial: Trial, is_direct: bool) -> None:
        """Write into the file of a job until when it may train: the deadline, less what comes after training."""
        after = max((after_training(rung) for rung in trial.rungs), default=0.0)
        left = self.setting.options.time - self.elapsed - self.completing if is_direct else self.left(self.store.trials())
        spec = read_json(file) | {"until": self.clock() + left - after}
        if is_direct:
            spec["seconds"] = self.setting.options.time  # of a longer search than the one that wrote the file
        results.write(file, json.dumps(spec, indent=1))

    def write_job(self, file: Path, result: Path, label: str, overrides: list[str], **more: Any) -> None:
        entry = self.setting.entry(label)
        spec = {
            "source": entry.source,
            "text": entry.text,
            "overrides": overrides,
            "result": str(result),
            "choosing": 1.0 if self.setting.others is not None else choosing.CHOOSING,
            "seed": self.seed,
            "in_bytes": self.setting.in_bytes,
            **more,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        results.write(file, json.dumps(spec, indent=1))

    def record(self, trial: Trial, action: Next, answer: dict[str, Any]) -> None:
        kept = {name: value for name, value in answer.items() if name not in schedule.Rung.__dataclass_fields__}
        rung = Rung(
            score=float(answer["score"]),
            loss=float(answer["loss"]),
            trunk=int(answer["trunk"]),
            cooldown=int(answer["cooldown"]),
            seconds=float(answer["seconds"]),
            trained=float(answer["trained"]),
            at=self.elapsed,
            info=kept | {"rung": action.rung},
        )
        self.store.record(trial.number, rung, bool(answer["is_complete"]))
        trials = self.store.trials()
        self.screen.measured(trials, trial.number, self.quality, self.elapsed)
        self.tidy(trials)

    def look(self, trial: int) -> None:
        """Called while a job runs: shows the time, and ends the search if only the final run fits into what is left."""
        self.store.keep_alive(trial)
        self.screen.look(self.elapsed)
        trials = self.store.trials()
        late = -self.left(trials) > GRACE * self.setting.options.time
        if late and schedule.winner(trials) is not None:
            raise OutOfTime

    def trunk(self, trial: Trial, rung: int) -> Path:
        """The checkpoint before the cooldown of a rung."""
        return self.place(trial.number, rung) / f"checkpoint-{trial.rungs[rung].trunk}"

    def cooled(self, trial: Trial, rung: int) -> Path:
        """The checkpoint after the cooldown of a rung."""
        found = trial.rungs[rung]
        return self.place(trial.number, rung) / f"checkpoint-{found.trunk + found.cooldown}"

    def tidy(self, trials: list[Trial]) -> None:
        """Remove the checkpoints that nothing continues from: all but the last of each open trial, and the best result."""
        found = schedule.winner(trials)
        for trial in trials:
            for rung in range(len(trial.rungs)):
                kept = {self.trunk(trial, rung)} if rung == len(trial.rungs) - 1 and trial.is_open else set[Path]()
                if found is not None and (trial.number, rung) == (found[0].number, found[1]):
                    kept.add(self.cooled(trial, rung))
                for folder in checkpoints.all_checkpoints(self.place(trial.number, rung)):
                    if folder not in kept:
                        checkpoints.remove(folder)

    # the end

    def finish(self, interrupted: bool) -> None:
        """Finish the best trial as an ordinary run, and write the report. Raises RunError if nothing was measured."""
        trials = self.store.trials()
        while (found := schedule.winner(trials)) is not None:
            trial, rung = found
            self.screen.finishing(trial, self.store.params(trial.number), self.elapsed)
            answer = self.final(trial, rung)
            if answer["status"] == errors.NAMES[errors.OK]:
                break
            self.screen.failed(trial, str(answer["sentence"]))
            trials = [each for each in trials if each.number != trial.number]
        else:
            raise self.nothing(interrupted)
        luck = self.luck(trial, rung, answer)
        table = results.table(self.setting, self.store, (trial, rung), luck, self.elapsed, answer, interrupted)
        page.publish(self.folder, table)
        if not interrupted:
            self.end(trial)  # after everything is written: the same command does nothing more then
        self.screen.result(table, self.folder)

    def end(self, winner: Trial) -> None:
        """Mark the search as finished, and remove all checkpoints but the one from which the winner can be continued."""
        kept = self.trunk(winner, len(winner.rungs) - 1)
        trials = self.store.trials()
        self.store.put("closed", [each.number for each in trials if each.number != winner.number or not kept.is_dir()])
        self.store.put("spent", self.elapsed)
        self.store.put("finished", True)
        for each in trials:
            for index in range(len(each.rungs) + 1):
                for checkpoint in checkpoints.all_checkpoints(self.place(each.number, index)):
                    if checkpoint != kept:
                        checkpoints.remove(checkpoint)

    def nothing(self, interrupted: bool) -> RunError:
        if interrupted:
            text = "interrupted before any candidate was measured; the same command continues"
            return RunError(text, errors.INTERRUPTED)
        failed = [trial for trial in self.store.trials() if trial.failed]
        if failed:
            return RunError(f"no candidate could be measured; the first: {failed[0].label}: {failed[0].failed}", errors.CRASH)
        return RunError("the time was over before any candidate was measured; give more with --time", errors.USER)

    def final(self, trial: Trial, rung: int) -> dict[str, Any]:
        """Run the final job of a trial."""
        found, entry = trial.rungs[rung], self.setting.entry(trial.label)
        steps = None if trial.is_complete else (found.trunk, found.cooldown)
        settings = space.overrides(self.store.params(trial.number))
        overrides = recipes.final(self.setting, entry, settings, self.folder, steps)
        file, result = self.folder / TRIALS / f"{FINAL}.job.json", self.folder / TRIALS / f"{FINAL}.result.json"
        result.unlink(missing_ok=True)
        cooled = self.cooled(trial, rung)  # gone if another one was better: then it is trained again, with the same weights
        start: dict[str, Any] = {"checkpoint": None}
        if not trial.is_complete and cooled.is_dir():
            start = {"checkpoint": str(cooled), "measured": str(self.place(trial.number, rung) / recipes.SUMS)}
        self.write_job(file, result, trial.label, overrides, kind="final", others=self.setting.others, **start)
        return self.runner.run(file, result, lambda: self.screen.look(self.elapsed))

    def luck(self, trial: Trial, rung: int, answer: dict[str, Any]) -> dict[str, Any] | None:
        """The winner on rows that did not choose it."""
        if self.setting.others is None:
            return choosing.luck(self.place(trial.number, rung), self.quality, choosing.CHOOSING, self.seed)
        return choosing.luck_against(trial.rungs[rung].info, answer["others"], int(answer["other_rows"]))
