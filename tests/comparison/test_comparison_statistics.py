"""Intervals and Pareto fronts compared with slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.comparison import results
from hfstrat.comparison.results import Interval

Parts = tuple[np.ndarray, np.ndarray]


def measured(seed: int, seeds: int = 3, rows: int = 30) -> Parts:
    random = np.random.default_rng(seed)
    return random.gamma(2.0, size=(seeds, rows)), random.integers(1, 9, size=(seeds, rows)).astype(float)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 200])
def test_the_quantile_is_that_of_scipy(freedom: int) -> None:
    reference = pytest.importorskip("scipy.stats").t.ppf(0.975, freedom)
    assert results.student(freedom) == pytest.approx(reference, rel=1e-7)


def test_the_interval_over_seeds_is_that_of_scipy() -> None:
    values = [0.81, 0.79, 0.84, 0.80]
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert results.over_seeds(values) == pytest.approx(wanted, rel=1e-7)
    assert results.over_seeds([0.8]) is None
    assert results.over_seeds([0.8, 0.8]) == Interval(0.8, 0.8)


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
