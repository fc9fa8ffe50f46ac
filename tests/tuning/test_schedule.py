"""The laws of a search, with simulated jobs: the deadline, the best candidate, kills, several processes."""

from __future__ import annotations

import io
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.classifiers import labeled
from helpers.pages import check
from helpers.searches import FINISH, Clock, Events, Killed, Played, in_order, options, play
from rich.console import Console

from hfstrat.cli import tune as cli_tune
from hfstrat.errors import RunError, UserError
from hfstrat.tuning import options as tuning_options
from hfstrat.tuning import results, schedule, search, space, tune
from hfstrat.tuning.options import Advice
from hfstrat.tuning.schedule import Bracket, Candidates, Rung, Trial
from hfstrat.tuning.screen import Screen
from hfstrat.tuning.store import Store


@pytest.fixture(scope="module")
def encoder(bodies: Any) -> Path:
    return Path(bodies("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled(tmp_path_factory.mktemp("labeled"))


@pytest.mark.parametrize("time", [40.0, 90.0, 600.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_deadline_is_kept(encoder: Path, data: Path, tmp_path: Path, time: float, seed: int) -> None:
    """The final run included, also if each job takes up to 25 % longer or shorter than the one before."""
    source, clock = random.Random(seed), Clock()
    runner = Played(clock, jitter=lambda number: source.uniform(0.9, 1.15))
    table = play(options(encoder, data, tmp_path / "run", time=time), runner)
    assert clock.now - 1000 <= 1.05 * time
    assert runner.jobs[-1]["kind"] == "final"
    if time > 60:
        assert clock.now - 1000 >= 0.75 * time, "what is left is spent"
        best = max(table["trials"], key=lambda each: each.get("quality", 0))
        assert table["winner"] == best["number"]


def test_the_best_candidate_is_continued_and_wins(encoder: Path, data: Path, tmp_path: Path) -> None:
    """Each level continues the best third of the one before; checkpoints are continued, never trained again."""
    runner = Played(Clock())
    table = play(options(encoder, data, tmp_path / "run", time=600.0), runner)
    assert table["trials"][0]["label"] == "full"
    assert 0.99 < sum(table["importances"]["all candidates"].values()) < 1.01
    page = (tmp_path / "run" / "report.html").read_text()
    check(page)
    assert page.count("<svg") > 6
    assert str(tmp_path) not in page, "a page is shared"
    rungs = [job for job in runner.jobs if job["kind"] == "rung"]
    places = [job["result"] for job in rungs]
    assert len(set(places)) == len(places)
    lengths: dict[str, int] = {}
    for job in rungs:
        folder = str(Path(job["result"]).parent)
        assert job["answer"]["trunk"] > lengths.get(folder, 0)
        lengths[folder] = job["answer"]["trunk"]
    store = Store(tmp_path / "run", 42)
    trials, bracket = store.trials(), store.brackets()[0]
    members = [trial for trial in trials if trial.bracket == 1]
    for level, size in enumerate(bracket.sizes()[1:], 1):
        ranked = sorted(members, key=lambda trial: trial.rungs[level - 1].key, reverse=True)
        assert all(len(trial.rungs) > level for trial in ranked[:size])
        members = ranked[:size]


def test_killed_at_any_event_the_winner_is_the_same(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few writes, or in the middle of one, the search is killed; all results equal those of an uninterrupted one."""

    def run(name: str, lives: Any) -> tuple[dict[str, Any], list[Any], int]:
        events, clock, kills = Events(monkeypatch), Clock(), 0
        asked = options(encoder, data, tmp_path / name, time=150.0)
        for life, mode in lives:
            events.left, events.mode = life, mode
            try:
                table = play(asked, Played(clock, events))
                break
            except Killed:
                kills += 1
                clock.now += 500.0  # the time until the command is repeated does not count
        monkeypatch.undo()
        kept = [(each.label, each.bracket, [(rung.trunk, rung.score) for rung in each.rungs]) for each in trials_of(asked)]
        return table, kept, kills

    whole, expected, _ = run("whole", [(None, "")])
    lives, modes = itertools.cycle((4, 7, 5, 9, 6)), itertools.cycle(("before", "after", "torn"))
    found, kept, kills = run("killed", zip(lives, modes, strict=False))
    assert kills > 10
    assert kept == expected
    assert (found["winner"], found["rung"]) == (whole["winner"], whole["rung"])


@pytest.mark.parametrize("wrote", [False, True])
def test_killed_while_the_results_are_written_they_are_written_again(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrote: bool
) -> None:
    """A search is finished once its table is there, not before."""
    clock, asked, publish = Clock(), options(encoder, data, tmp_path / "run", time=60.0), search.page.publish

    def killed(folder: Path, table: dict[str, Any]) -> None:
        if wrote:
            publish(folder, table)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(search.page, "publish", killed)
        with pytest.raises(Killed):
            play(asked, Played(clock))
    found = play(asked, Played(clock))
    assert found["winner"] == json.loads((asked.folder / "tune.json").read_text())["winner"]
    assert Store(asked.folder, asked.seed).get("finished")


def trials_of(asked: Any) -> list[Trial]:
    return Store(asked.folder, asked.seed).trials()


@pytest.mark.slow
def test_two_processes_share_a_search(encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial is trained by one of them, and what one process has claimed the other leaves alone."""
    monkeypatch.setattr(search, "PAUSE", 0.0)
    asked = options(encoder, data, tmp_path / "run", time=900.0)
    setting = tuning_options.ordered(tuning_options.check(asked), in_order(dict.fromkeys(("head", "lora", "full")), 0))  # type: ignore[misc]
    tune.claim(asked.folder)
    clock = Clock()
    shown = io.StringIO()
    screen = Screen(Console(file=shown, force_terminal=True, width=120))
    first = search.Search(setting, Played(clock), screen, clock, clock.now)
    screen.begin(setting, first.candidates, 0.0)
    second = search.Search(setting, Played(clock), search.Screen(), clock, clock.now, leads=False)
    second.store.me = f"{second.store.me.rpartition(':')[0]}:1"  # another process that lives
    done: list[tuple[int, int]] = []

    def claimed(action: schedule.Next) -> None:
        done.append((action.trial, action.rung))
        if not any(claims):
            claims.append(True)
            for _ in range(3):
                second.step()  # while the first trains
            claims.pop()
        type(first).train(first, action)

    claims: list[bool] = []
    first.train = claimed  # type: ignore[method-assign]
    while first.step():
        pass
    rungs = [(trial.number, index) for trial in first.store.trials() for index in range(len(trial.rungs))]
    assert len(set(rungs)) == len(rungs)
    screen.close()
    assert all(word in shown.getvalue() for word in ("candidate", "#1", "left; ", "best so far"))
    assert len(second.runner.jobs) > 2  # type: ignore[attr-defined]
    both = [job["result"] for each in (first, second) for job in each.runner.jobs]  # type: ignore[attr-defined]
    assert len(set(both)) == len(both)


def test_a_rung_that_takes_too_long_is_stopped(encoder: Path, data: Path, tmp_path: Path) -> None:
    """Another program slows the machine down: the best so far is finished in time."""
    clock = Clock()
    runner = Played(clock, jitter=lambda number: 40.0 if number == 3 else 1.0)
    play(options(encoder, data, tmp_path / "run", time=150.0), runner)
    assert clock.now - 1000 <= 1.05 * 150
    assert runner.jobs[-1]["kind"] == "final"


def test_if_the_winner_cannot_be_finished_the_next_best_is(encoder: Path, data: Path, tmp_path: Path) -> None:
    runner = Played(Clock())
    runner.unfinished = {"full"}
    play(options(encoder, data, tmp_path / "run", time=200.0), runner)
    finals = [job for job in runner.jobs if job["kind"] == "final"]
    assert [Path(job["source"]).stem == "full" for job in finals][-2:] == [True, False]
    assert finals[-1]["checkpoint"] is None, "its cooled checkpoint was not kept, so it is trained again"


def test_a_failed_candidate_is_left_out(encoder: Path, data: Path, tmp_path: Path) -> None:
    runner = Played(Clock())
    runner.broken = {"full"}
    table = play(options(encoder, data, tmp_path / "run"), runner)
    assert any(each["status"] == "failed" and each["label"] == "full" for each in table["trials"])
    assert table["trials"][0]["label"] != "full"
    assert sum(job["answer"]["status"] == "failed" for job in runner.jobs) == 1, "it is not proposed again"
    runner.broken = {"full", "lora"}
    with pytest.raises(RunError, match=r"no candidate could be measured; the first: .*: the loss is not finite"):
        play(options(encoder, data, tmp_path / "none", strategies="full,lora"), runner)


def test_an_interrupted_search_finishes_the_best_and_continues(encoder: Path, data: Path, tmp_path: Path) -> None:
    asked, clock = options(encoder, data, tmp_path / "run", time=200.0), Clock()

    class Interrupted(Played):
        def run(self, file: Path, result: Path, look: Any) -> dict[str, Any]:
            if len(self.jobs) == 3 and "rung" in file.name:
                raise KeyboardInterrupt
            return super().run(file, result, look)

    with pytest.raises(RunError, match="verified") as error:
        play(asked, Interrupted(clock))
    assert error.value.code == 130
    assert json.loads((asked.folder / "tune.json").read_text())["interrupted"]
    before = trials_of(asked)
    runner = Played(clock)
    table = play(asked, runner)
    assert not table["interrupted"]
    assert len(runner.jobs) > 2
    assert [trial.rungs[:1] for trial in trials_of(asked)][: len(before) - 1] == [trial.rungs[:1] for trial in before][:-1]


class WithCheckpoints(Played):
    """Rungs leave the checkpoint before their cooldown, as real ones do."""

    def run(self, file: Path, result: Path, look: Any) -> dict[str, Any]:
        answer = super().run(file, result, look)
        if file.name.startswith("rung") and not answer.get("is_complete", True):
            Path(str(file).removesuffix(".job.json"), f"checkpoint-{answer['trunk']}").mkdir(parents=True)
        return answer


def test_a_finished_search_is_extended_by_a_longer_time(encoder: Path, data: Path, tmp_path: Path) -> None:
    """The winner is continued from its checkpoint, the only one that is left; the others are compared, and never continued."""
    asked, clock = options(encoder, data, tmp_path / "run", time=100.0), Clock()
    first = play(asked, WithCheckpoints(clock))
    kept = [str(path.relative_to(asked.folder)) for path in asked.folder.glob("trials/*/*/checkpoint-*")]
    assert len(kept) == 1
    assert kept[0].startswith(f"trials/{first['winner']:03d}/")
    before = trials_of(asked)

    clock.now += 5000  # a day later
    again, began = WithCheckpoints(clock), clock.now
    second = play(options(encoder, data, tmp_path / "run", time=300.0), again)
    assert 150 < clock.now - began <= 1.05 * 200
    for old, new in zip(before, trials_of(asked), strict=False):
        assert new.rungs[: len(old.rungs)] == old.rungs
        assert old.number == first["winner"] or not old.rungs or new.rungs == old.rungs
    started = [job["overrides"] for job in again.jobs if job["kind"] == "rung"]
    assert any(kept[0] in override for overrides in started for override in overrides), "the winner is continued"
    assert second["trials"][0]["quality"] >= first["trials"][0]["quality"]

    idle = WithCheckpoints(clock)
    play(options(encoder, data, tmp_path / "run", time=300.0), idle)
    assert [job["kind"] for job in idle.jobs] == ["final"], "the time is over"


def test_mistakes_are_refused_before_anything_is_written(encoder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"

    def refused(words: str, advise: Any = in_order, **given: Any) -> None:
        with pytest.raises(UserError, match=words):
            tune.tune(options(encoder, data, output, **given), advise, lambda folder: Played(Clock()), Clock())
        assert not output.exists()

    refused("nothing to tune", model=None)
    refused("--time: 10s is too short for even one candidate: head needs about 20s", time=10.0)
    refused(
        "no strategy fits into the memory of this machine: head: too large",
        advise=lambda loaded, seconds: Advice([], {}, {"head": "too large"}),
    )
    refused(r"--search: r: none of the candidates \(head, full\) has strategy.r", search=("r",), strategies="head,full")
    refused("--eval-data", eval_data=str(tmp_path / "missing.csv"))
    refused("is set by the search", overrides=["training.max_steps=3"])
    with pytest.raises(UserError, match="--search: rank: cannot be searched; expected some of learning_rate"):
        space.parse_keys("rank")


def test_another_search_in_the_folder_is_refused(encoder: Path, data: Path, tmp_path: Path) -> None:
    play(options(encoder, data, tmp_path / "run", time=60.0), Played(Clock()))
    with pytest.raises(UserError, match="holds a search with other settings"):
        play(options(encoder, data, tmp_path / "run", time=60.0, seed=7), Played(Clock()))
    runner = Played(Clock())
    play(options(encoder, data, tmp_path / "run", time=60.0), runner)
    assert len(runner.jobs) <= 1, "nothing is measured again"


def test_a_round_takes_half_of_the_time_and_trains_as_long_as_it_loads() -> None:
    """For any fixed costs and any time left."""
    for fixed, left in itertools.product((1.0, 5.0, 30.0), (20.0, 100.0, 1000.0, 20_000.0)):
        candidates = Candidates((), ("a", "b", "c", "d"), fixed=fixed)
        bracket = schedule.plan(candidates, [], left, [])
        if bracket is None:
            assert left <= fixed + schedule.LEAST_SECONDS
            continue
        if bracket.is_direct:
            assert left <= 5 * fixed
            continue
        cost = sum(size * (fixed + bracket.takes(level)) for level, size in enumerate(bracket.sizes()))
        assert cost <= (left if bracket.count == 1 else schedule.SHARE * left * 1.0001)
        assert bracket.count == 1 or bracket.seconds >= 0.75 * fixed


@pytest.mark.parametrize("time", [27.0, 40.0])
def test_a_single_candidate_that_fits_is_trained_as_the_final_run(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: float
) -> None:
    """In time, with a kill before each event: it is neither evaluated nor loaded twice, and what is left is spent."""
    asked = options(encoder, data, tmp_path / "run", time=time, strategies="lora,full")
    events, clock = Events(monkeypatch), Clock()
    for life in itertools.chain((2, 3, 4, 5), itertools.repeat(None)):
        events.left = life
        try:
            table = play(asked, runner := Played(clock, events))
            break
        except Killed:
            continue
    assert table["winner"] == 0
    assert len(table["trials"]) == 1
    assert 0.6 * time < clock.now - 1000 <= 1.05 * time
    assert runner.jobs[-1]["kind"] == "final"
    assert runner.jobs[-1]["answer"]["seconds"] < 1
    assert "no other candidate was measured" in results.sentences(table)[0]


def test_the_next_candidate_is_trained_if_the_only_one_that_fits_fails(encoder: Path, data: Path, tmp_path: Path) -> None:
    runner = Played(Clock())
    runner.broken = {"lora"}
    table = play(options(encoder, data, tmp_path / "run", time=40.0, strategies="lora,full"), runner)
    assert [job["kind"] for job in runner.jobs] == ["direct", "direct", "final"]
    assert [each["label"] for each in table["trials"]] == ["full", "lora"]
    assert table["trials"][1]["status"] == "failed"


def test_a_candidate_that_is_solved_is_not_ended_by_a_clock() -> None:
    """Contrastive training and then a solved head: it takes long, but no steps."""
    candidates = Candidates((), ("head", "full"), fixed=8.0, can_be_direct=False)
    bracket = schedule.plan(candidates, [], 25.0, [])
    assert bracket is not None
    assert not bracket.is_direct


def test_more_strategies_are_tried_where_they_cost_less_than_assumed() -> None:
    """The first round has as many as the assumed costs allow; before one is continued, others get as much time as it."""
    candidates = Candidates((), ("a", "b", "c"), fixed=8.0)
    first = schedule.plan(candidates, [], 50.0, [])
    assert first is not None
    assert first.count == 1
    seconds = first.seconds

    def trial(number: int, label: str, bracket: int, fixed: float, *scores: float) -> Trial:
        rungs = tuple(Rung(score, 0.5, 10, 2, fixed + seconds, seconds, 0.0) for score in scores)
        return Trial(number, label, bracket, rungs)

    trials, brackets = [trial(0, "a", 1, 1.0, 0.5)], [first]
    left = 4 * (seconds + 1.0)
    wider = schedule.decide(candidates, trials, brackets, left)
    assert wider.do == "open"
    assert wider.opened == Bracket(1, seconds, widens=True)
    brackets.append(wider.opened)
    assert schedule.decide(candidates, trials, brackets, left).label == "b"
    trials.append(trial(1, "b", 2, 1.0))
    trains = schedule.decide(candidates, trials, brackets, left)
    assert (trains.do, trains.trial, trains.seconds) == ("train", 1, seconds)
    trials[1] = trial(1, "b", 2, 1.0, 0.7)
    left -= seconds + 1.0
    assert schedule.decide(candidates, trials, brackets, left).do == "open"  # the third one
    continues = schedule.decide(candidates, trials, brackets, 1.9 * (seconds + 1.0))
    assert (continues.do, continues.trial, continues.rung) == ("train", 1, 1)
    expensive = schedule.decide(candidates, [trial(0, "a", 1, 20.0, 0.5)], [first], left)
    assert (expensive.do, expensive.trial) == ("train", 0)


def test_the_winner_is_not_continued_once_it_gets_worse() -> None:
    def trial(number: int, scores: list[float], half: float = 0.0) -> Trial:
        about = [{"low": score - half, "high": score + half} if half else {} for score in scores]
        rungs = [Rung(score, 1 - score, 10 * 2**n, 2, 10.0, 5.0, 0.0, about[n]) for n, score in enumerate(scores)]
        return Trial(number, "lora", 1, tuple(rungs))

    candidates, bracket = Candidates((), ("lora",), can_vary=False), [Bracket(1, 5.0)]
    better = schedule.decide(candidates, [trial(0, [0.5, 0.6])], bracket, 100.0)
    assert (better.do, better.trial, better.rung) == ("train", 0, 2)
    assert schedule.decide(candidates, [trial(0, [0.6, 0.5])], bracket, 100.0).do == "stop"
    assert schedule.decide(candidates, [trial(0, [0.6, 0.5], half=0.1)], bracket, 100.0).do == "stop"  # two standard errors
    unclear = schedule.decide(candidates, [trial(0, [0.6, 0.58], half=0.1)], bracket, 100.0)
    assert (unclear.do, unclear.rung) == ("train", 2)
    assert schedule.winner([trial(0, [0.6, 0.5]), trial(1, [0.55])]) == (trial(0, [0.6, 0.5]), 0)
    assert FINISH > 0


def test_one_helper_for_each_further_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the search to exist, and gives up if the process that starts it ends first."""
    started: list[str] = []
    monkeypatch.setattr(cli_tune.launch, "count_gpus", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setattr(cli_tune, "start_helper", lambda folder, device: started.append(device))
    monkeypatch.setattr(cli_tune.children, "terminate", lambda child: None)
    with cli_tune.helpers(tmp_path):
        assert started == ["5", "7"]
    assert cli_tune.runner(tmp_path).environment["CUDA_VISIBLE_DEVICES"] == "4"
    assert not cli_tune.runner(tmp_path).forks
    joined: list[Path] = []
    assert cli_tune.wait_and_join(tmp_path, -1, lambda folder: joined.append(folder) or 0) == 0
    assert not joined
    (tmp_path / tune.OPTIONS).write_text("{}")
    assert cli_tune.wait_and_join(tmp_path, -1, lambda folder: joined.append(folder) or 0) == 0
    assert joined == [tmp_path]


def test_a_search_without_time_for_all_leaves_out_the_unlikely() -> None:
    """With time for all, each of them is tried, whatever the advisor expects."""
    others = ("a", "b", "c", "d")
    for left in (60.0, 90.0, 150.0, 1000.0):
        every = schedule.plan(Candidates((), others), [], left, [])
        some = schedule.plan(Candidates((), others, unlikely=("b", "c", "d")), [], left, [])
        assert every is not None
        assert some is not None
        assert some.count == (every.count if every.count >= len(others) else 1)
        assert some.seconds >= every.seconds
    five = Candidates((), (*others, "e"), unlikely=("d", "e"))
    counts = {bracket.count for left in range(20, 400, 5) if (bracket := schedule.plan(five, [], float(left), [])) is not None}
    assert {5} < counts <= {1, 2, 3, 5, 6, 9, 12, 18, 27}
    candidates = Candidates((), others, unlikely=("a", "c", "d"))
    assert schedule.untried(candidates, []) == ["b", "a", "c", "d"]
    rung = Rung(0.5, 0.5, 10, 2, 6.0, 5.0, 0.0)
    tried, first = [Trial(0, "b", 1, (rung,))], [Bracket(1, 5.0)]
    after = schedule.decide(candidates, tried, first, 20.0)
    assert (after.do, after.trial) == ("train", 0)  # no other one is tried beside it
    assert schedule.decide(candidates, tried, first, 100.0).do == "open"  # each of the others takes 6 of these seconds


def test_after_a_failure_others_are_tried_also_the_unlikely() -> None:
    """As long as there is time for one, whatever the first round left out."""
    candidates = Candidates((), ("a", "b", "c"), can_vary=False, unlikely=("b", "c"))
    first = schedule.plan(candidates, [], 40.0, [])
    assert first is not None
    assert first.count == 1
    trials, brackets = [Trial(0, "a", 1, failed="it does not work")], [first]
    for label in ("b", "c"):
        action = schedule.decide(candidates, trials, brackets, 95.0)
        assert action.do == "open"
        assert action.opened is not None
        brackets.append(action.opened)
        action = schedule.decide(candidates, trials, brackets, 95.0)
        assert (action.do, action.label) == ("new", label)
        trials.append(Trial(len(trials), label, len(brackets), failed="it does not work"))
    assert schedule.decide(candidates, trials, brackets, 95.0).do == "stop"


@pytest.mark.parametrize("fixed", [3.0, 30.0])
def test_every_decision_leads_on(fixed: float) -> None:
    """Whatever a job was expected to cost, no round is opened for which nobody is asked, again and again."""
    candidates = Candidates(("head",), ("a", "b", "c"), fixed=fixed)
    for left in (12.0, 20.0, 28.0, 34.0, 60.0):
        trials = [Trial(0, "head", 0, (Rung(0.5, 0.5, 0, 0, 3.0, 1.0, 0.0),), is_complete=True)]
        brackets: list[Bracket] = []
        remaining, opened = left, 0
        for _ in range(200):
            action = schedule.decide(candidates, trials, brackets, remaining)
            opened = opened + 1 if action.do == "open" else 0
            assert opened < 2
            if action.do == "stop":
                break
            if action.do == "open":
                assert action.opened is not None
                brackets.append(action.opened)
            elif action.do == "new":
                trials.append(Trial(len(trials), action.label or "a", action.bracket))
            else:
                rung = Rung(0.6, 0.5, 10, 2, 2.0 + action.seconds, action.seconds, 0.0)
                trials = [
                    replace(trial, rungs=(*trial.rungs, rung)) if trial.number == action.trial else trial for trial in trials
                ]
                remaining -= 2.0 + action.seconds
        else:
            pytest.fail("the search does not end")
