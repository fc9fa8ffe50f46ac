"""Intervals and Pareto fronts compared with slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from hfstrat.comparison import results
from hfstrat.comparison.results import Interval

Parts = tuple[np.ndarray, np.ndarray]


def measured(seed: int, seeds: int = 3, rows: int = 30) -> Parts:
    random = np.random.default_rng(seed)
    return random.gamma(2.0, size=(seeds, rows)), random.integers(1, 9, size=(seeds, rows)).astype(float)


def test_the_interval_over_seeds_is_students_on_a_scale_of_its_own() -> None:
    values = np.array([0.81, 0.79, 0.84, 0.80])

    def reference(scaled: np.ndarray) -> tuple[float, float]:
        return stats.t.interval(0.95, 3, loc=scaled.mean(), scale=stats.sem(scaled))  # type: ignore[no-any-return]

    assert results.over_seeds(values.tolist()) == pytest.approx(np.exp(reference(np.log(values))), rel=1e-7)
    assert results.over_seeds((-values).tolist()) == pytest.approx(reference(-values), rel=1e-7)
    counted = (values * 100 + 0.5) / 101
    wanted = (special.expit(reference(special.logit(counted))) * 101 - 0.5) / 100
    assert results.over_seeds(values.tolist(), 100) == pytest.approx(wanted, rel=1e-7)
    assert results.over_seeds([0.8]) is None
    assert results.over_seeds([0.8, 0.8]) == pytest.approx(Interval(0.8, 0.8))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=5))
def test_an_interval_of_shares_stays_between_zero_and_one(right: list[int]) -> None:
    values = [count / 50 for count in right]
    found = results.over_seeds(values, 50)
    assert found is not None
    assert 0 <= found.low <= found.high <= 1
    assert found.low - 1e-9 <= np.median(values) <= found.high + 1e-9 or len(values) > 2


def test_an_interval_of_losses_stays_above_zero() -> None:
    found = results.over_seeds([0.01, 3.0])
    assert found is not None
    assert 0 < found.low < 0.01
    assert found.high > 3.0


def test_the_interval_of_shares_has_the_stated_coverage() -> None:
    random, truth, hits = np.random.default_rng(0), 0.9, 0
    for _ in range(400):
        spread = special.expit(special.logit(truth) + 0.2 * random.standard_normal(3))
        found = results.over_seeds((np.round(spread * 1000) / 1000).tolist(), 1000)
        assert found is not None
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_resampling_draws_the_same_examples_for_all() -> None:
    """The reference repeats each example as often as it was drawn and measures again."""
    parts = {"a": measured(1), "b": measured(2)}
    found = results.resampled(parts, resamples=25, seed=7)
    drawn = np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), size=25)
    for name, (above, below) in parts.items():
        slow = [np.mean([a[rows].sum() / b[rows].sum() for a, b in zip(above, below, strict=True)]) for rows in expand(drawn)]
        assert found[name] == pytest.approx(slow, rel=1e-12)


def expand(drawn: np.ndarray) -> list[np.ndarray]:
    return [np.repeat(np.arange(len(counts)), counts) for counts in drawn]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = results.resampled({"a": measured(1)}, resamples=50)["a"]
    monkeypatch.setattr(results, "AT_ONCE", 30 * 7)
    assert np.array_equal(results.resampled({"a": measured(1)}, resamples=50)["a"], whole)


def test_a_model_does_not_differ_from_itself() -> None:
    draws = results.resampled({"a": measured(1), "b": measured(1)}, resamples=100)
    assert results.interval(draws["a"] - draws["b"]) == (0.0, 0.0)


def test_the_difference_is_antisymmetric() -> None:
    draws = results.resampled({"a": measured(1), "b": measured(2)}, resamples=200)
    forward, backward = (results.interval(draws[x] - draws[y]) for x, y in (("a", "b"), ("b", "a")))
    assert forward == pytest.approx((-backward.high, -backward.low))


def test_the_paired_interval_has_the_stated_coverage() -> None:
    """Two models, one right on 5 % more of all examples, measured on 200 examples 120 times."""
    random, hits = np.random.default_rng(3), 0
    for trial in range(120):
        hard = random.random(200)
        scores = {name: (hard < skill).astype(float)[None] for name, skill in (("a", 0.75), ("b", 0.70))}
        draws = results.resampled({name: (each, np.ones((1, 200))) for name, each in scores.items()}, 300, seed=trial)
        low, high = results.interval(draws["a"] - draws["b"])
        hits += low <= 0.05 <= high
    assert hits >= 106  # 114 are expected; a binomial of 120 is below 106 with probability 0.001


Points = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1)


@settings(max_examples=200, deadline=None)
@given(Points, st.booleans())
def test_the_front_is_what_nothing_dominates(points: dict[str, tuple[int, int]], higher: bool) -> None:
    found = results.front({name: (float(q), float(p)) for name, (q, p) in points.items()}, higher)
    assert found

    def dominates(one: str, other: str) -> bool:
        (q, p), (r, s) = points[one], points[other]
        as_good, better = (q >= r, q > r) if higher else (q <= r, q < r)
        return as_good and p <= s and (better or p < s)

    for name in points:
        assert (name in found) == (not any(dominates(other, name) for other in points))


@settings(max_examples=50, deadline=None)
@given(Points)
def test_a_dominated_point_does_not_change_the_front(points: dict[str, tuple[int, int]]) -> None:
    some = {name: (float(q), float(p)) for name, (q, p) in points.items()}
    assert results.front({**some, "worst": (-1.0, 9.0)}, True) == results.front(some, True)
