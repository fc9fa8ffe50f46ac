"""What a deadline changes: nothing is cached for an unknown number of epochs; a search orders its candidates by their end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl

from hfstrat.advisor import architecture, candidates, decide, measure, speed
from hfstrat.advisor.data import Survey
from hfstrat.advisor.decide import Measured, Situation
from hfstrat.advisor.hardware import Device
from hfstrat.cli import tune
from hfstrat.tuning import options
from hfstrat.tuning.tune import as_stored

CPU = Device("a CPU", 16.0 * 2**30, is_cpu=True)


def situation(time: float | None, rows: int = 10_000) -> Situation:
    lengths = np.full(50, 256)
    data = Survey("rows", "causal-lm", rows, lengths, max_length=256)
    rate = speed.Rate(1e11, "a test", product=1e11)
    return Situation(architecture.by_hand("30M", 4096, 2048), data, CPU, CPU.memory, time=time, rate=rate, runs=())


def timed(given: Situation, name: str) -> decide.Timed:
    return decide.estimate(decide.fit(candidates.propose(name, given.model, given.data), given), given)


@pytest.mark.parametrize("name", ["partial", "head"])
def test_a_run_that_the_clock_ends_caches_nothing(name: str) -> None:
    """A run over several epochs computes the frozen part once; one with `max_time` does not know how often it would use it."""
    complete = timed(situation(None), name)
    assert complete.work.once > 0
    cut = timed(situation(0.2 * complete.seconds), name)
    assert cut.work.once == 0
    assert cut.work.training > complete.work.training
    assert 0 < cut.epochs < complete.epochs
    assert cut.in_time
    longer = timed(situation(0.4 * complete.seconds), name)
    assert longer.epochs > cut.epochs


def test_fewer_evaluations_leave_more_time_to_train() -> None:
    for name in ("partial", "lora", "full"):
        given = situation(None)
        limited = replace(given, time=0.3 * timed(given, name).seconds)
        assert timed(replace(limited, evaluations=0.0), name).epochs > timed(limited, name).epochs


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, models: Callable[..., Path]) -> Callable[[float], options.Options]:
    folder = tmp_path_factory.mktemp("search")
    draw = random.Random(0)
    rows = [{"text": " ".join(str(draw.randint(0, 999)) for _ in range(40))} for _ in range(400)]
    data, model = write_jsonl(folder / "rows.jsonl", rows), models()

    def for_time(time: float) -> options.Options:
        named, search = "partial,scratch", ("learning_rate",)
        return options.Options([], [], str(model), str(data), named, None, time, None, search, str(folder / "out"))

    return for_time


def test_a_search_measures_the_base_before_it_compares_new_weights(
    search: Callable[[float], options.Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether new weights are better depends on how badly the base predicts the texts; a short search does not ask."""
    asked: list[Any] = []

    def found(bits: float) -> Callable[..., Measured]:
        def answer(given: Situation, names: list[str], seconds: float) -> Measured:
            asked.append((names, seconds))
            return Measured({}, raw={"bits_per_byte": {"data": {"needed": bits, "expected": 1.0}}}, domain_gap=bits - 1)

        return answer

    def advice(time: float, bits: float) -> options.Advice:
        monkeypatch.setattr(measure, "measure", found(bits))
        given = search(time)
        loaded = {entry.label: entry.loaded for entry in options.check(given).entries}
        return tune.adviser(given)(loaded, 0.0)

    advice(tune.BASE_FROM - 1, 8.0)
    assert not asked
    bad, good = advice(tune.BASE_FROM, 30.0), advice(tune.BASE_FROM, 0.2)
    assert (bad.order[0], bad.unlikely) == ("scratch", ("partial",))
    assert (good.order[0], good.unlikely) == ("partial", ("scratch",))
    assert asked == 2 * [([], tune.BASE_SECONDS)]


def test_a_new_model_has_a_size_that_suits_the_texts(search: Callable[[float], options.Options], tmp_path: Path) -> None:
    """That of `hfstrat advise`, not that of the base; a search that continues has it too, and compares bits per byte."""
    given = search(60.0)
    plain = options.check(given)
    advice = tune.adviser(given)({entry.label: entry.loaded for entry in plain.entries}, 0.0)
    made = options.ordered(plain, advice)
    strategy = made.entry("scratch").loaded.recipe.strategy
    assert (plain.entry("scratch").loaded.recipe.strategy.parameters, plain.in_bytes) == (None, False)
    assert strategy.parameters is not None
    assert strategy.tokenizer is not None
    assert made.in_bytes
    stored = {"order": [entry.label for entry in made.entries], "excluded": {}, "sized": made.sized}
    again = as_stored(plain, stored)
    assert again.entry("scratch").loaded.recipe == made.entry("scratch").loaded.recipe
    assert again.in_bytes
    own = replace(given, overrides=["strategy.config={num_hidden_layers: 1}"], strategies="scratch")
    entries = {entry.label: entry.loaded for entry in options.check(own).entries}
    assert not tune.adviser(own)(entries, 0.0).sized  # what the user has set stays
