"""What `--measure` derives from passes, texts and probes."""

from __future__ import annotations

import collections
import json
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import sentences, write_jsonl

from hfstrat.advisor import child, hardware, measure
from hfstrat.cli.advise import Request, advise, measured, situation_of
from hfstrat.errors import UserError


def test_the_fixed_cost_of_passes_and_of_optimizer_steps_is_separated_from_that_of_tokens() -> None:
    """Passes of known seconds and seconds per token, with an optimizer step after each fourth: all are recovered."""
    source = random.Random(0)
    tokens = [source.randint(50, 400) for _ in range(40)]
    passes = [(0.05 + 0.002 * count + (0.3 if place % 4 == 3 else 0.0), place % 4 == 3) for place, count in enumerate(tokens)]
    passes[0] = (9.0, False)  # the first ones compile
    found = child.typical_step(passes, [float(count) for count in tokens], 1000.0, 4)
    assert found["fixed"] == pytest.approx(4 * 0.05 + 0.3)
    assert found["seconds"] == pytest.approx(0.002 * 1000 + 4 * 0.05 + 0.3)
    alike = child.typical_step([(0.3, True)] * 9, [100.0] * 9, 100.0)  # of passes of one length nothing is fixed
    assert (alike["seconds"], alike["fixed"]) == (pytest.approx(0.3), pytest.approx(0.0))


def test_the_probe_of_words_separates_topics_and_not_noise() -> None:
    draw = random.Random(3)
    texts = [[draw.randrange(10, 60) for _ in range(8)] + [n % 2] for n in range(120)]
    labels = torch.arange(120) % 2
    assert child.cross_validate_words(texts, labels, 2) > 0.8
    noise = torch.randint(0, 2, (120,), generator=torch.Generator().manual_seed(0))
    assert child.cross_validate_words([text[:-1] for text in texts], noise, 2) < 0.75
    assert child.cross_validate_words(texts, labels[:, None].double(), 1) > 0.5


def test_what_was_measured_when_time_was_over_is_used(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring process is ended, with the processes that it started; its last complete answer counts."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, time\nprint(json.dumps({'rates': {}, 'failed': {}, 'left': ['lora']}), flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(measure, "CHILD", [str(script)])
    started = time.monotonic()
    raw = measure._run_child({}, 1.0)
    assert time.monotonic() - started < 30
    assert "no time was left for lora" in " ".join(measure.interpret(raw, {}).lines)
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(UserError, match="give more time"):
        measure._run_child({}, 0.5)


def test_speeds_of_a_busy_machine_are_not_used() -> None:
    step = {"seconds": 1.0, "tokens": 100.0, "passes": 9.0, "others": 0.5}
    lines = measure.interpret({"rates": {"lora": step}, "failed": {}}, {}).lines
    assert any("other processes used 50% of the cores" in line for line in lines)


def test_an_obstacle_is_a_remark_unless_the_user_asked(tiny: Path, tmp_path: Path) -> None:
    given = situation_of(Request(parameters="30M", rows=100, tokens=10_000, device="a100"))
    assert "sizes given by hand" in measured(given, ["lora"], "auto")[1]
    assert measured(given, ["lora"], None) == (given, "")
    with pytest.raises(UserError, match="--measure: it needs a model folder and data"):
        measured(given, ["lora"], "30s")


def test_a_base_expects_texts_like_its_pretraining_data(shared: Path) -> None:
    """A model of stories needs about the bits that it expects on stories, and far more on their shuffled words."""
    story = (shared / "data" / "tinystories_sample" / "tiny_stories.txt").read_text(encoding="utf-8")
    words, source = story.split()[:800], random.Random(0)
    texts = [words[start : start + 100] for start in range(0, 800, 100)]
    kinds = {"data": [" ".join(text) for text in texts], "shuffled": [" ".join(source.sample(text, 100)) for text in texts]}
    found = child.bits_per_byte(str(shared / "models" / "stories260K"), kinds, 60.0, 256)
    gaps = {kind: one["needed"] / one["expected"] - 1 for kind, one in found.items()}
    assert abs(gaps["data"]) < 0.35
    assert gaps["shuffled"] > 0.7
    raw = {"rates": {}, "failed": {}, "bits_per_byte": found | {"reference": found["shuffled"]}}
    assert measure.interpret(raw, {}).domain_gap == pytest.approx(gaps["data"])


def test_the_learning_curve_reports_whether_more_data_helps() -> None:
    assert "more data would help" in measure.learning_curve({100: 0.6, 200: 0.7, 400: 0.8})
    assert "more data would hardly help" in measure.learning_curve({100: 0.79, 200: 0.8, 400: 0.801})


@pytest.mark.slow
def test_measured_rates_are_reported(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(200, seed=4)])
    request = Request(model=str(tiny), data=str(file), device="cpu", measure="30s", strategies="lora,full")
    advise(request, None, as_json=True)
    found = json.loads(capsys.readouterr().out)["measured"]
    assert set(found["raw"]["rates"]) == {"lora", "full"}, found
    assert found["raw"]["bits_per_byte"]["data"]["needed"] > 0


def test_others_are_counted_on_the_cores_of_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, of which this process may use the first: another process that fills the second is nothing to it."""
    times = collections.namedtuple("times", "user nice system idle iowait irq softirq steal guest guest_nice")
    clock = {"first": times(10, 0, 0, 90, 0, 0, 0, 0, 0, 0), "second": times(0, 0, 0, 100, 0, 0, 0, 0, 0, 0), "own": 10.0}
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [clock["first"], clock["second"]])
    monkeypatch.setattr(hardware, "available_cores", lambda: [0])
    monkeypatch.setattr(hardware.time, "process_time", lambda: clock["own"])
    seen = hardware.Busyness()
    clock |= {"first": clock["first"]._replace(user=16, idle=94), "second": clock["second"]._replace(user=10), "own": 16.0}
    assert seen.of_others() == 0  # the first core was ours for 6 of 10 seconds, and idle for the rest
    clock |= {"first": clock["first"]._replace(user=26), "own": 18.0}
    assert seen.of_others() == pytest.approx(8 / 20)  # 10 more seconds, 2 of them ours
