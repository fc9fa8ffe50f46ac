"""The study of a search: Optuna's storage holds every trial with its rungs, so that a killed search loses nothing.

One attribute is one line of a journal, written with fsync; a line that a kill cut off is removed when the study is opened. The
lock is released by the kernel when its holder dies (Optuna's own locks are files that stay for 30 seconds).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hfstrat.tuning.schedule import Bracket, Rung, Trial
from hfstrat.tuning.space import STRATEGY

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STUDY, LOCK, CLAIMS = "study.log", ".hfstrat.tune.lock", "claims"
Suggest = Callable[["optuna.Trial", Sequence[str] | None], Any]
NAME = "hfstrat tune"
STALE = 60.0  # seconds without a sign of life after which the claim of a process of another machine is void
STARTUP = 8  # trials before the sampler follows its model


class FileLock:
    """A lock that dies with its process (flock). Implements Optuna's BaseJournalFileLock."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._held: IO[str] | None = None

    def acquire(self) -> bool:
        self._held = self.file.open("w")
        fcntl.flock(self._held, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


class Store:
    """The study in a folder. All changes are single writes; `locked` makes a decision and its claim one step.

    Args:
        folder: of the search.
        seed: of the sampler.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder, self.seed = folder, seed
        file = folder / STUDY
        self._lock = FileLock(folder / f"{STUDY}.lock")
        self._decision = FileLock(folder / f"{STUDY}.decision")
        with self._holding(self._lock):
            repair(file)
        backend = JournalFileBackend(str(file), lock_obj=self._lock)  # type: ignore[arg-type]
        self.study: optuna.Study = optuna.create_study(
            storage=JournalStorage(backend), study_name=NAME, direction="maximize", load_if_exists=True
        )
        self.me = f"{socket.gethostname()}:{os.getpid()}"

    @staticmethod
    @contextlib.contextmanager
    def _holding(lock: FileLock) -> Iterator[None]:
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time decides what to do next."""
        with self._holding(self._decision):
            yield

    # the study

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.study.user_attrs.get(key, otherwise)

    def put(self, key: str, value: Any) -> None:
        if self.get(key) != value:
            self.study.set_user_attr(key, value)

    def brackets(self) -> list[Bracket]:
        return [Bracket(**each) for each in self.get("brackets", [])]

    def open_bracket(self, bracket: Bracket) -> None:
        self.put("brackets", [*self.get("brackets", []), asdict(bracket)])

    def reopen(self) -> None:
        """Let a finished search go on; a candidate that was trained as the final run is one of an ordinary round then."""
        self.put("brackets", [{**each, "is_direct": False} for each in self.get("brackets", [])])
        self.put("finished", False)

    # trials

    def trials(self) -> list[Trial]:
        """All trials that have been asked for."""
        return [self._trial(frozen) for frozen in self._asked()]

    def _asked(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return [frozen for frozen in self.study.get_trials(deepcopy=False) if frozen.state != TrialState.WAITING]

    def _trial(self, frozen: FrozenTrial) -> Trial:
        kept = frozen.user_attrs
        rungs = tuple(Rung(**each) for each in kept.get("rungs", []))
        return Trial(
            frozen.number,
            str(frozen.params.get(STRATEGY, "")),
            int(kept.get("bracket", -1)),
            rungs,
            bool(kept.get("is_complete")),
            str(kept.get("failed", "")),
            self.is_claimed(frozen.number),
            frozen.number in self.get("closed", []),
        )

    def params(self, number: int) -> dict[str, Any]:
        return dict(self.study.get_trials(deepcopy=False)[number].params)

    def ask(self, bracket: int, fixed: dict[str, Any] | None, suggest: Suggest, labels: Sequence[str]) -> int:
        """Ask for a new trial; returns its number. The same results always give the same proposal.

        Args:
            bracket: of the trial.
            fixed: its parameters; None: as TPE proposes them (Bergstra et al. 2011) from the first rungs of all trials.
            suggest: suggests all parameters of a trial, whose strategy is one of some labels (None: of all).
            labels: the strategies that TPE may propose.
        """
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        if not any(frozen.state == optuna.trial.TrialState.WAITING for frozen in trials):
            given = self._propose(suggest, labels, len(trials)) if fixed is None else fixed
            self.study.enqueue_trial(given, user_attrs={"bracket": bracket})
        trial = self.study.ask()
        suggest(trial, None)
        trial.set_user_attr("is_asked", True)
        return trial.number

    def _propose(self, suggest: Suggest, labels: Sequence[str], number: int) -> dict[str, Any]:
        """The parameters of the next trial. The first rungs are as long for all, so they can be compared."""
        import optuna

        sampler = optuna.samplers.TPESampler(
            seed=self.seed + 1000 * number, n_startup_trials=STARTUP, multivariate=True, group=True, constant_liar=True
        )
        trial = self.first_rungs(labels, sampler).ask()
        suggest(trial, labels)
        return trial.params

    def first_rungs(self, labels: Sequence[str], sampler: Any = None) -> optuna.Study:
        """The trials of some strategies with the scores of their first rungs, as a study in memory."""
        import optuna

        study = optuna.create_study(direction="maximize", sampler=sampler)
        for frozen, trial in zip(self._asked(), self.trials(), strict=True):
            if trial.failed or trial.label not in labels:
                continue
            state = optuna.trial.TrialState.COMPLETE if trial.rungs else optuna.trial.TrialState.RUNNING
            places = {**frozen.distributions, STRATEGY: optuna.distributions.CategoricalDistribution(labels)}
            value = trial.rungs[0].score if trial.rungs else None
            made = optuna.trial.create_trial(state=state, value=value, params=frozen.params, distributions=places)
            study.add_trial(made)
        return study

    def finish_asking(self, suggest: Suggest) -> None:
        """Complete the parameters of a trial whose asking was interrupted."""
        import optuna

        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state == optuna.trial.TrialState.RUNNING and not frozen.user_attrs.get("is_asked"):
                trial = optuna.trial.Trial(self.study, frozen._trial_id)
                suggest(trial, None)
                trial.set_user_attr("is_asked", True)

    def record(self, number: int, rung: Rung, is_complete: bool) -> None:
        """Store a rung of a trial. A rung that is stored already is not stored again."""
        trial = self._running(number)
        kept = trial.user_attrs.get("rungs", [])
        index = int(rung.info["rung"])
        if index < len(kept):
            return
        trial.report(rung.score, index)
        if is_complete:
            trial.set_user_attr("is_complete", True)
        trial.set_user_attr("rungs", [*kept, asdict(rung)])

    def fail(self, number: int, reason: str) -> None:
        self._running(number).set_user_attr("failed", reason)

    def _running(self, number: int) -> optuna.Trial:
        import optuna

        return optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)

    def close(self) -> None:
        """Tell Optuna the final value of each trial, so that its own tools (such as the dashboard) show a finished study."""
        from optuna.trial import TrialState

        for trial in self.trials():
            state = self.study.get_trials(deepcopy=False)[trial.number].state
            if state == TrialState.RUNNING and trial.rungs:
                self.study.tell(trial.number, trial.rungs[trial.best].score)
            elif state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)

    # claims: a file for each trial that a process is working on

    def claim(self, number: int) -> None:
        folder = self.folder / CLAIMS
        folder.mkdir(exist_ok=True)
        partial = folder / f"{number}.{os.getpid()}.partial"
        partial.write_text(json.dumps({"by": self.me}), encoding="utf-8")
        partial.replace(folder / str(number))

    def keep_alive(self, number: int) -> None:
        """A sign of life for processes of other machines."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / CLAIMS / str(number))

    def release(self, number: int) -> None:
        (self.folder / CLAIMS / str(number)).unlink(missing_ok=True)

    def is_claimed(self, number: int) -> bool:
        """Whether another process, which is alive, works on a trial."""
        file = self.folder / CLAIMS / str(number)
        try:
            by, age = json.loads(file.read_text(encoding="utf-8"))["by"], time.time() - file.stat().st_mtime
        except (OSError, ValueError, KeyError):
            return False
        host, _, process = str(by).rpartition(":")
        if by == self.me:
            return False
        return is_alive(int(process)) if host == socket.gethostname() else age < STALE


def is_alive(process: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def repair(file: Path) -> None:
    """Remove a last line that a kill cut off; Optuna would refuse to read past it."""
    if not file.is_file():
        return
    with file.open("rb+") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.truncate(content.rfind(b"\n") + 1)
