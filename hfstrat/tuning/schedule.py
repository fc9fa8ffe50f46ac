"""What a search does next: a function of what is measured so far and of the time that is left.

Successive halving by time (Jamieson and Talwalkar 2016, arXiv 1502.07943): a round trains its candidates for a short time and
continues the best third of them for three times as long, and so on. One round takes half of the time; the other half continues
the best candidate, each time for as long as it was trained before, while that improves it. If it does not, the next round tries
other settings. Training is never repeated: a candidate continues from its checkpoint at a constant rate, and only a short
cooldown at the end of each rung is its own (Hägele et al. 2024, arXiv 2405.18392).

Everything here is computed from the stored results, so a search that is killed makes the same decisions again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hfstrat.evaluation.intervals import Z

FACTOR = 3  # candidates of a level for each one of the next, which trains this many times as long
SHARE = 0.5  # of the time left for one round
COUNTS = (27, 18, 12, 9, 6, 4, 3, 2, 1)  # candidates of a round, the most that the time allows
SEGMENT = (
    0.8  # training time of a rung in multiples of the total time of its level: what was trained before, but a new cooldown
)
LEAST_SHARE = 0.25  # of the training time so far that a continuation must have at least
AT_ONCE = 0.1  # of the time left, for a strategy that was expected to take seconds and has to be trained
LEAST_SECONDS = 1.0  # of training in a rung
HOPELESS = 3  # failed candidates at least after which a search without any result ends
SMALL = 4.0  # of the seconds of a job that do not train: with less time than this, one candidate is trained, and only once
VARIETY = 9  # candidates of a round for each strategy with something to search


@dataclass(frozen=True)
class Rung:
    """A candidate after training to a certain length, with a cooldown.

    score: on the rows for choosing; higher is better. loss: breaks ties.
    trunk, cooldown: steps before the cooldown, over all rungs, and steps of the cooldown.
    seconds: of the whole job. trained: of its training.
    at: seconds of the search when it was recorded.
    info: what the report shows.
    """

    score: float
    loss: float
    trunk: int
    cooldown: int
    seconds: float
    trained: float
    at: float
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def fixed(self) -> float:
        """Seconds that do not train: start, loading, evaluation, checkpoint."""
        return max(0.0, self.seconds - self.trained)

    @property
    def key(self) -> tuple[float, float]:
        """Larger is better."""
        return self.score, -self.loss

    @property
    def noise(self) -> float:
        """A standard error of the score over the rows that choose; 0 where it has no interval."""
        low, high = self.info.get("low"), self.info.get("high")
        return 0.0 if low is None or high is None else max(0.0, float(high) - float(low)) / (2 * Z)


@dataclass(frozen=True)
class Trial:
    """A strategy with settings. `bracket` 0: it is measured at once, because it takes seconds."""

    number: int
    label: str
    bracket: int
    rungs: tuple[Rung, ...] = ()
    is_complete: bool = False  # training longer changes nothing
    failed: str = ""
    is_claimed: bool = False  # by another process
    is_closed: bool = False  # its checkpoints were removed when the search had finished

    @property
    def is_open(self) -> bool:
        return not self.failed and not self.is_complete and not (self.is_closed and self.rungs)

    @property
    def best(self) -> int:
        """The index of its best rung."""
        return max(range(len(self.rungs)), key=lambda index: (*self.rungs[index].key, -index))

    @property
    def has_stalled(self) -> bool:
        """Whether its last rung was worse than one before, by more than their rows leave open."""
        if len(self.rungs) < 2 or self.best == len(self.rungs) - 1:
            return False
        best, last = self.rungs[self.best], self.rungs[-1]
        return last.score <= best.score - last.noise

    @property
    def trained(self) -> float:
        return sum(rung.trained for rung in self.rungs)


@dataclass(frozen=True)
class Bracket:
    """A round of successive halving: candidates on its first level, and the seconds that each trains there.

    is_direct: the one candidate that the time allows is trained as the final run, which loads and evaluates only once.
    widens: its candidate is another strategy with its default settings, beside those of the first round.
    """

    count: int
    seconds: float
    is_direct: bool = False
    widens: bool = False

    def sizes(self) -> list[int]:
        """Candidates by level; the last one left is continued by `_continue`, not here."""
        sizes = [self.count]
        while sizes[-1] > FACTOR or (sizes[-1] > 2 and math.ceil(sizes[-1] / FACTOR) > 1):
            sizes.append(math.ceil(sizes[-1] / FACTOR))
        return sizes

    def takes(self, level: int) -> float:
        """Seconds that a candidate trains on this level."""
        return self.seconds * (1.0 if level == 0 else SEGMENT * FACTOR**level)


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from: strategies in the order of the advisor, those that take seconds apart from the others.

    unlikely: those that the advisor expects to be worse; they are tried with their default settings only if the time
        allows all strategies, or if the others fail.
    """

    at_once: tuple[str, ...]
    others: tuple[str, ...]
    can_vary: bool = True  # whether anything is searched besides the strategy
    fixed: float = 8.0  # seconds of a job that do not train, before one is measured
    can_be_direct: bool = True  # whether all of the others are trained step by step, so that a clock can end them
    unlikely: tuple[str, ...] = ()

    @property
    def likely(self) -> int:
        return max(1, sum(label not in self.unlikely for label in self.others))

    @property
    def most(self) -> int:
        return len(self.others) * (VARIETY if self.can_vary else 1)


Action = Literal["open", "new", "train", "wait", "stop"]


@dataclass(frozen=True)
class Next:
    """The next thing to do: open a bracket, ask for a new trial, train one for some seconds, wait for others, or stop."""

    do: Action
    bracket: int = 0
    opened: Bracket | None = None
    label: str | None = None  # of a new trial; None: as the sampler proposes
    trial: int = -1
    rung: int = 0
    seconds: float = 0.0
    is_direct: bool = False  # trained as the final run


def decide(candidates: Candidates, trials: Sequence[Trial], brackets: Sequence[Bracket], left: float) -> Next:
    """The next action.

    Args:
        candidates: the strategies.
        trials: all trials so far.
        brackets: the rounds so far.
        left: seconds until the winner has to be finished.
    """
    known = {trial.label for trial in trials if trial.bracket == 0}
    for trial in trials:
        if trial.bracket == 0 and not trial.rungs and not trial.failed and not trial.is_claimed:
            return Next("train", trial=trial.number, seconds=max(LEAST_SECONDS, AT_ONCE * left))
    for label in candidates.at_once:
        if label not in known:
            return Next("new", label=label)
    if brackets and brackets[0].is_direct and (action := _direct(candidates, trials)) is not None:
        return action
    if left < LEAST_SECONDS:
        return Next("stop")
    failed = [trial for trial in trials if trial.failed]
    if len(failed) >= max(HOPELESS, len(candidates.others)) and not any(trial.rungs for trial in trials):
        return _after(trials, Next("stop"))
    if not candidates.others:
        return _after(trials, Next("stop"))
    for number, bracket in enumerate(brackets, 1):
        action = _level(candidates, trials, bracket, number, left)
        if action is not None:
            return action
    if (wider := _wider(candidates, trials, brackets, left)) is not None:
        return Next("open", len(brackets) + 1, opened=wider)
    return _continue(candidates, trials, brackets, left)


def _direct(candidates: Candidates, trials: Sequence[Trial]) -> Next | None:
    """The next action of a search whose candidate is trained as the final run, the next one if that failed; None at the end."""
    if any(trial.rungs for trial in trials):
        return Next("stop")
    for trial in trials:
        if not trial.failed:
            return Next("wait" if trial.is_claimed else "train", 1, trial=trial.number, is_direct=True)
    if len(trials) < len(candidates.others):
        return Next("new", 1, label=untried(candidates, trials)[0])
    return None


def fixed_seconds(candidates: Candidates, trials: Sequence[Trial], label: str | None = None) -> float:
    """Seconds of a job that do not train: those measured with this strategy, else with any, else the assumed ones."""
    own = [rung.fixed for trial in trials if trial.label == label for rung in trial.rungs]
    every = [rung.fixed for trial in trials for rung in trial.rungs if not trial.is_complete]
    found = own or every
    return statistics.median(found) if found else candidates.fixed


def _level(candidates: Candidates, trials: Sequence[Trial], bracket: Bracket, number: int, left: float) -> Next | None:
    """The next action within a round; None if it is over."""
    waits = False
    alive = members = [trial for trial in trials if trial.bracket == number]
    for level, size in enumerate(bracket.sizes()):
        if level > 0:
            measured = [trial for trial in alive if len(trial.rungs) >= level and trial.is_open]
            alive = sorted(measured, key=lambda trial: trial.rungs[level - 1].key, reverse=True)[:size]
        for trial in alive:
            if trial.failed or len(trial.rungs) > level or (trial.is_complete and trial.rungs):
                continue
            if trial.is_claimed:
                waits = True
                continue
            seconds = min(bracket.takes(level), left - fixed_seconds(candidates, trials, trial.label))
            if seconds >= LEAST_SECONDS:
                return Next("train", number, trial=trial.number, rung=level, seconds=seconds)
        if level == 0 and len(members) < size:
            if left - fixed_seconds(candidates, trials) >= max(LEAST_SECONDS, bracket.seconds / 2):
                is_default = number == 1 or bracket.widens
                return Next("new", number, label=next(iter(untried(candidates, trials)), None) if is_default else None)
            return None
        if waits:
            return Next("wait")
    return None


def untried(candidates: Candidates, trials: Sequence[Trial]) -> list[str]:
    """The strategies that were not trained yet: each is first tried with its default settings, as the advisor orders them."""
    tried = {trial.label for trial in trials}
    return sorted((label for label in candidates.others if label not in tried), key=lambda label: label in candidates.unlikely)


def _wider(candidates: Candidates, trials: Sequence[Trial], brackets: Sequence[Bracket], left: float) -> Bracket | None:
    """One more strategy, trained as long as those of the first round; None if there is none, or half of the time is not enough.

    How many strategies the first round has was decided before it was known what a job costs besides training. Where all that
    were tried have failed, another one may take all of the time.
    """
    others = untried(candidates, trials)
    if not brackets or brackets[0].is_direct or not all(bracket.widens for bracket in brackets[1:]) or not others:
        return None
    if not any(trial.bracket == len(brackets) for trial in trials):
        return None  # nobody was asked for the last round: the time was too short
    seconds, fixed = brackets[0].seconds, fixed_seconds(candidates, trials)
    if not any(trial.rungs for trial in trials if trial.bracket):
        seconds = min(seconds, left - fixed)
        return Bracket(1, seconds, widens=True) if seconds >= LEAST_SECONDS else None
    most = SHARE * left
    if len(others) * (seconds + fixed) > most:
        others = [label for label in others if label not in candidates.unlikely]
    return Bracket(1, seconds, widens=True) if others and seconds + fixed <= most else None


def _continue(candidates: Candidates, trials: Sequence[Trial], brackets: Sequence[Bracket], left: float) -> Next:
    """After the rounds: continue the best trial while it improves, or open another round."""
    measured = [trial for trial in trials if trial.is_open and trial.rungs and not trial.is_claimed]
    ranked = sorted(measured, key=lambda trial: (*trial.rungs[trial.best].key, -trial.number), reverse=True)
    claimed = [trial for trial in trials if trial.is_claimed]
    best = None if not ranked or any(_leads(trial, ranked[0]) for trial in claimed) else ranked[0]
    if best is not None and (action := _longer(candidates, trials, best, left)) is not None:
        return action
    if claimed:
        return Next("wait")
    if (bracket := plan(candidates, trials, left, brackets)) is not None:
        return Next("open", len(brackets) + 1, opened=bracket)
    others = (_longer(candidates, trials, trial, left) for trial in ranked[1:])
    return next((action for action in others if action is not None), Next("stop"))


def _leads(trial: Trial, other: Trial) -> bool:
    return bool(trial.rungs) and trial.rungs[trial.best].key > other.rungs[other.best].key


def _longer(candidates: Candidates, trials: Sequence[Trial], trial: Trial, left: float) -> Next | None:
    """Train a trial for as long again as it was trained, or for all that is left; None if it got worse or there is no time."""
    fixed = fixed_seconds(candidates, trials, trial.label)
    room = left - fixed
    if trial.has_stalled or room < max(LEAST_SECONDS, LEAST_SHARE * trial.trained):
        return None
    seconds = room if room < 2.5 * trial.trained + fixed else trial.trained
    return Next("train", trial.bracket, trial=trial.number, rung=len(trial.rungs), seconds=seconds)


def plan(candidates: Candidates, trials: Sequence[Trial], left: float, before: Sequence[Bracket]) -> Bracket | None:
    """A round with as many candidates as the time allows, each trained for at least as long as its other costs.

    A later round trains about as long as the first, so that the sampler can compare their candidates.

    Args:
        before: the earlier rounds.

    Returns:
        None if not even one candidate fits; or two, in a later round, which needs something to search. Where a single
        candidate hardly fits, and no other was measured at once, it is trained as the final run.
    """
    first = not before
    if not first and not candidates.can_vary:
        return None
    fixed = fixed_seconds(candidates, trials)
    least = max(LEAST_SECONDS, 0.75 * fixed, *(0.75 * bracket.seconds for bracket in before[:1]))
    counts = {*COUNTS, len(candidates.others)} if first else COUNTS
    for count in sorted(counts, reverse=True):
        if count > candidates.most or (count < 2 and not first):
            continue
        if first and candidates.likely < count < len(candidates.others):
            continue
        levels = list(enumerate(Bracket(count, 1.0).sizes()))
        units = sum(size * Bracket(count, 1.0).takes(level) for level, size in levels)
        seconds = (SHARE * left - fixed * sum(size for _, size in levels)) / units
        if seconds >= least:
            return Bracket(count, seconds)
    room = left - fixed
    if first and candidates.can_be_direct and not candidates.at_once and room <= SMALL * fixed:
        return Bracket(1, max(LEAST_SECONDS, room), is_direct=True)
    return Bracket(1, room / 2 if room > SMALL * fixed else room) if first and room >= LEAST_SECONDS else None


def _after(trials: Sequence[Trial], otherwise: Next) -> Next:
    return Next("wait") if any(trial.is_claimed and not trial.rungs for trial in trials) else otherwise


def winner(trials: Sequence[Trial]) -> tuple[Trial, int] | None:
    """The best trial and the index of its rung; None if nothing is measured. The earlier of equals wins."""
    measured = [trial for trial in trials if trial.rungs]
    if not measured:
        return None
    best = max(measured, key=lambda trial: (*trial.rungs[trial.best].key, -trial.number))
    return best, best.best
