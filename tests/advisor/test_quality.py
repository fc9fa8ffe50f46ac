"""Laws of the expected quality: more time never hurts, no number without runs, intervals cover, a user's own runs count."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from hfstrat.advisor import architecture, decide, expected, measured_runs, quality, recipes, speed
from hfstrat.advisor.data import Survey, by_hand
from hfstrat.advisor.decide import Situation
from hfstrat.advisor.expected import Known, Plan
from hfstrat.advisor.hardware import Device
from hfstrat.advisor.measured_runs import CLASSES, TEXT, Run, shipped
from hfstrat.strategies import defaults

LAPTOP = Device("a laptop", 16.0 * 2**30, is_cpu=True)
RATE = speed.Rate(0.49e11, "a test", product=1e11)
MINILM = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
MINILM |= {"intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512}


def minilm() -> architecture.Model:
    return architecture.from_config("MiniLM", MINILM, {}, 91_000_000)


def labeled(rows: int, classes: int, length: int = 15) -> Survey:
    return by_hand(rows, rows * length, "text-classification", classes, 512)


def random_known(source: random.Random) -> Known:
    if source.random() < 0.5:
        data, score = labeled(source.choice([100, 1000, 20_000]), source.choice([2, 6, 77])), source.choice([None, 0.7])
        return Known(data, tf_idf=score, probe=source.choice([None, 0.8]) if score else None)
    data, gap = by_hand(1000, 100_000, "causal-lm", 0, 512), source.choice([None, 0.2, 1.2])
    return Known(data, gap=gap, base_bits=1.2 if gap else None, ngram=2.0)


def test_more_steps_are_never_predicted_to_be_worse() -> None:
    source = random.Random(5)
    for _ in range(60):
        known, name = random_known(source), source.choice(["partial", "lora", "full", "head"])
        plans = [Plan(name, 22.7e6, False, steps, 16 * steps) for steps in (1, 4, 20, 100, 500, 5000, 1e6)]
        merits = [one.merit for one in expected.expect(plans, known)]
        assert merits == sorted(merits), (known, name)


def test_intervals_hold_what_was_measured_on_data_sets_left_out() -> None:
    """Each interval is computed without the data set that it is checked on."""
    runs = measured_runs.shipped()
    like = Run("", "", CLASSES, "", 2e7, False, "lora", 1000, 2, 100, 1600)
    kinds = [like, like._replace(tf_idf=0.5), like._replace(tf_idf=0.5, probe=0.5)]
    kinds += [like._replace(task=TEXT, classes=1), like._replace(task=TEXT, classes=1, gap=0.5)]
    for kind in kinds:
        learned = quality.learn(quality.comparable(runs, kind))
        assert 0.70 <= quality.coverage(learned) <= 0.90, kind


def test_nothing_is_predicted_without_known_runs() -> None:
    plan = Plan("lora", 2e7, False, 100, 1600)
    numbers = by_hand(100, 2000, "regression", 0, 512)
    several = replace(labeled(100, 4), many=True)
    for data in (numbers, several):
        found = expected.expect([plan], Known(data))[0]
        assert (found.value, found.low, found.best) == (None, None, None)
        assert "no runs of" in found.basis
    found = expected.expect([replace(plan, strategy="scratch")], Known(labeled(1000, 4)))[0]
    assert found.value is None
    assert found.basis == "no measured runs of scratch on such data are known"


def test_without_numbers_random_weights_are_last_and_the_order_is_that_of_time() -> None:
    situation = Situation(minilm(), by_hand(500, 10_000, "regression", 0, 512), LAPTOP, LAPTOP.memory, rate=RATE)
    ranked = decide.decide(situation, defaults.ORDER).ranked
    places = [(not each.candidate.strategy.needs_weights, each.timed.seconds) for each in ranked]
    assert places == sorted(places)
    assert ranked[-1].name == "scratch"


@pytest.mark.parametrize("task", [CLASSES, TEXT])
def test_own_runs_shift_and_narrow_what_is_expected(task: str) -> None:
    """On the same data more than on other data; the other strategies on this data too."""
    data = labeled(1000, 4) if task == CLASSES else by_hand(1000, 100_000, "causal-lm", 0, 512)
    plans = [Plan(name, 2e7, task == TEXT, 200, 3200) for name in ("lora", "full")]
    before = expected.expect(plans, Known(data))
    values = {"value": 0.55} if task == CLASSES else {"value": 2.9, "base": 3.0}
    classes = 4 if task == CLASSES else 1
    own = Run(
        expected.group_of(data), measured_runs.YOURS, task, "", 2e7, task == TEXT, "lora", 1000, classes, 200, 3200, **values
    )
    after = expected.expect(plans, Known(data, runs=(*shipped(), own, own._replace(steps=150, seen=2400))))
    for old, new in zip(before, after, strict=True):
        assert new.merit < old.merit - 0.02
        assert "of them yours" in new.basis
    elsewhere = own._replace(group="other data")
    far = expected.expect(plans, Known(data, runs=(*shipped(), elsewhere, elsewhere._replace(steps=150))))
    assert far[0].merit > after[0].merit


@pytest.mark.parametrize(
    ("rows", "classes", "time"), [(15_000, 150, 90.0), (10_003, 77, 85.0)], ids=["150 classes", "banking77"]
)
def test_many_classes_and_little_time_call_for_a_solved_head(rows: int, classes: int, time: float) -> None:
    """Measured: 15,000 rows of 150 classes, 90 s on a laptop: head 96.0 %, lora 49.4 %; banking77: head 92.9, lora 87.5 %."""
    situation = Situation(minilm(), labeled(rows, classes), LAPTOP, LAPTOP.memory, time=time, rate=RATE)
    ranked = decide.decide(situation, defaults.ORDER).ranked
    assert ranked[0].name == "head"
    found = {each.name: each.expected for each in ranked}
    assert found["lora"].value is not None
    assert found["head"].value is not None
    assert found["lora"].value < found["head"].value
    if classes == 150:
        # 96.0 is 2 points above the interval of the head: the sets of many classes in the table are harder, and it holds 80 %
        assert found["head"].low < 0.96
        assert found["lora"].low < 0.494 < found["lora"].high


def test_a_hundredth_of_an_epoch_in_time_is_not_better_than_a_head_that_is_a_minute_late() -> None:
    slow = speed.Rate(2e9, "a slow machine", product=4e9)
    situation = Situation(minilm(), labeled(15_000, 150), LAPTOP, LAPTOP.memory, time=3600.0, rate=slow)
    head = next(each for each in decide.decide(situation, ["head"]).ranked)
    tight = replace(situation, time=head.timed.seconds - 50)
    ranked = decide.decide(tight, ["lora", "full", "head"]).ranked
    assert ranked[0].name == "head"
    assert not ranked[0].timed.in_time
    assert "late" in ranked[0].timed.words


def test_the_winner_and_all_within_its_interval_are_written() -> None:
    situation = Situation(minilm(), labeled(2000, 4), LAPTOP, LAPTOP.memory, rate=RATE)
    advice = decide.decide(situation, defaults.ORDER)
    first, names = advice.ranked[0], [each.name for _, each in recipes.chosen(advice)]
    assert names[0] == first.name
    assert set(names) == {each.name for each in advice.ranked if each is first or each.expected.reaches(first.expected)}
    assert "scratch" not in names


def test_the_chance_of_being_the_best_follows_the_expectation() -> None:
    source = random.Random(3)
    for _ in range(10):
        plans = [Plan(name, 22.7e6, False, 300, 4800) for name in ("partial", "lora", "full", "head")]
        found = [one for one in expected.expect(plans, random_known(source)) if one.best is not None]
        ordered = sorted(found, key=lambda one: one.merit)
        assert all(0 <= one.best <= 1 for one in found)
        assert ordered[-1].best >= max(one.best for one in found) - 0.03  # drawn at random


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    measured_runs.write(measured_runs.shipped(), tmp_path / "again.csv")
    assert tuple(measured_runs.read(tmp_path / "again.csv")) == measured_runs.shipped()
