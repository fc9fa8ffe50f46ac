"""The process of one run: start, end and interpretation of the ending."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hfstrat.comparison import processes
from hfstrat.comparison.processes import Run, execute, read_ending
from hfstrat.engine.children import outcome
from hfstrat.run import launch
from hfstrat.run.launch import Launch

OUTCOME = "import json, os; json.dump({'code': CODE, 'sentence': 'because'}, open(os.environ['HFSTRAT_OUTCOME'], 'w'))"


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`process("print(1)")` is a run whose process executes this code."""

    def get(code: str) -> Run:
        made = Launch([sys.executable, "-c", code], dict(os.environ), 1)
        monkeypatch.setattr(launch, "plan_launch", lambda *_: made)
        return Run("a", 1, "a.yaml", (), tmp_path / "a" / "seed-1", "identity")

    return get


def test_the_reported_outcome_is_stored(process: Any) -> None:
    number = "open(os.environ['HFSTRAT_OUTCOME'] + '.pid0', 'w').close()"
    run = process(f"print('hello'); {OUTCOME.replace('CODE', '4')}; {number}; raise SystemExit(4)")
    ending = execute(run, None, lambda: None)
    assert (ending.status, ending.sentence) == ("out-of-memory", "because")
    assert run.log.read_text() == "hello\n"
    assert read_ending(run) == ending
    assert sorted(path.name for path in run.folder.iterdir()) == ["log.txt", "state.json"]


def test_no_ending_mentions_deleted_checkpoints(process: Any) -> None:
    for hint in ("; the last complete checkpoint is a/b/checkpoint-10", "; no checkpoint exists yet", ""):
        sentence = f"the gradient is not finite at step 3{hint}. Halve training.learning_rate"
        ended = {"code": 5, "sentence": sentence, "checkpoints": hint}
        run = process(f"import json, os; json.dump({ended}, open(os.environ['HFSTRAT_OUTCOME'], 'w')); raise SystemExit(5)")
        assert execute(run, None, lambda: None).sentence == "the gradient is not finite at step 3. Halve training.learning_rate"


def test_a_finished_run_is_one_with_a_report(process: Any) -> None:
    run = process(OUTCOME.replace("CODE", "0"))
    assert execute(run, None, lambda: None).is_done
    assert read_ending(run) is None
    run.result.mkdir()
    (run.result / "report.json").write_text(json.dumps({"result": {"status": "done"}}))
    assert read_ending(run) is not None
    assert read_ending(Run(**{**vars(run), "identity": "another"})) is None


def test_a_broken_state_file_is_ignored(process: Any) -> None:
    run = process("pass")
    assert read_ending(run) is None
    run.folder.mkdir(parents=True)
    for text in ("", "{", "[]", '{"identity": "identity"}'):
        (run.folder / processes.STATE).write_text(text)
        assert read_ending(run) is None


def test_a_run_that_takes_too_long_is_ended(process: Any) -> None:
    run = process("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    ending = execute(run, 0.3, lambda: None)
    assert ending.status == "timed-out"
    assert "longer than 0 s" in ending.sentence or "longer than" in ending.sentence


def test_an_interruption_ends_the_process_and_stores_no_ending(process: Any, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    run = process(f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def look() -> None:
        if mark.exists() and mark.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(run, None, look)
    assert read_ending(run) is None
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_each_run_starts_with_an_empty_cache(process: Any) -> None:
    """The cache is its own and is deleted afterwards, so that the time does not depend on earlier runs."""
    run = process("import os; c = os.environ['HFSTRAT_CACHE']; os.mkdir(c); open(c + '/x', 'w'); print(c)")
    execute(run, None, lambda: None)
    assert run.log.read_text().strip() == str(run.folder / processes.CACHE)
    assert not (run.folder / processes.CACHE).exists()


def test_no_checkpoint_is_left(process: Any) -> None:
    """The result stays; checkpoints are deleted."""
    run = process("pass")
    for name in ("checkpoint-5", "checkpoint-10", "final"):
        (run.result / name).mkdir(parents=True)
    execute(run, None, lambda: None)
    assert [path.name for path in run.result.iterdir()] == ["final"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG of Linux")
def test_no_run_outlives_a_comparison_that_was_killed(tmp_path: Path) -> None:
    mark, child = tmp_path / "pid", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"""
import os, sys
from pathlib import Path
from hfstrat.run import launch
from hfstrat.comparison.processes import Run, execute
launch.plan_launch = lambda *_: launch.Launch([sys.executable, "-c", {child!r}, {str(mark)!r}], dict(os.environ), 1)
execute(Run("a", 1, "a.yaml", (), Path({str(tmp_path / "a")!r}), "x"), None, lambda: None)
"""
    import subprocess

    started = subprocess.Popen([sys.executable, "-c", parent], cwd=Path(__file__).parents[2])
    end = time.monotonic() + 30
    while not (mark.exists() and mark.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    number = int(mark.read_text())
    while Path(f"/proc/{number}").exists() and "zombie" not in state_of(number) and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{number}").exists() or "zombie" in state_of(number)


def state_of(number: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{number}/status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return "zombie"


@pytest.mark.parametrize(
    ("code", "reported", "kills", "status", "expected"),
    [
        (0, {"code": 0, "sentence": ""}, 0, "done", ""),
        (2, {"code": 2, "sentence": "data: no"}, 0, "refused", "data: no"),
        (3, {"code": 3, "sentence": "the loss"}, 0, "non-finite", "the loss"),
        (-9, {}, 1, "out-of-memory", "by the kernel, because memory ran out"),
        (-9, {}, 0, "out-of-memory", "most likely by the kernel"),
        (-11, {}, 0, "crashed", "signal 11 (SIGSEGV)"),
        (1, {}, 0, "crashed", "without a message"),
        (0, {}, 0, "crashed", "without a message"),
    ],
)
def test_outcomes_of_a_process(code: int, reported: dict[str, Any], kills: int, status: str, expected: str) -> None:
    found = outcome(code, reported, kills, None)
    assert found[0] == status
    assert expected in found[1]
