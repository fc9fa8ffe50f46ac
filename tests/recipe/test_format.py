"""Numbers as text: few digits, the right unit, and no step at the border of two units."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.recipe import format

CASES: list[tuple[Callable[..., str], dict[float | None, str]]] = [
    (
        format.duration,
        {
            None: "–",
            0.42: "0.4s",
            9.96: "10s",
            34.4: "34s",
            99.9: "1m 40s",
            725: "12m 05s",
            3599.6: "1h 00m",
            12_000: "3h 20m",
            86_399: "1d 00h",
            187_200: "2d 04h",
        },
    ),
    (format.clock, {0.2: "0:00", 247: "4:07", 3847: "1:04:07"}),
    (
        format.memory,
        {
            None: "–",
            2**17: "128 KiB",
            432 * 2**20: "432 MiB",
            999.6 * 2**20: "0.98 GiB",
            3.02 * 2**30: "3.02 GiB",
            2**40: "1.00 TiB",
        },
    ),
    (
        format.file_size,
        {None: "–", 999: "999 B", 3411: "3.41 kB", 405_000: "405 kB", 999_600: "1.00 MB"},
    ),
    (
        format.count,
        {None: "–", 7: "7", 8204: "8,204", 260_032: "260k", 1_380_000: "1.38M", 999_999: "1.00M", 7_241_732_096: "7.24B"},
    ),
    (format.percent, {None: "–", 0.8123: "81.2%"}),
    (format.rate, {None: "–", 12_345.4: "12,345 tokens/s", 0.517: "0.52 tokens/s"}),
]


@pytest.mark.parametrize(("function", "cases"), CASES, ids=lambda each: getattr(each, "__name__", ""))
def test_numbers_as_text(function: Callable[..., str], cases: dict[float | None, str]) -> None:
    assert {value: function(value) for value in cases} == cases


def test_metrics() -> None:
    assert format.metric("accuracy", 0.8123) == format.metric("eval_macro_f1", 0.8123) == "81.2%"
    assert format.metric("loss", 2.34567) == "2.3457"
    assert format.metric("loss", 2.34567, signed=True) == "+2.3457"
    assert format.metric("perplexity", 3.4512) == "3.45"
    assert format.metric("perplexity", 123_456.7) == "123,457"
    assert format.metric("loss", None) == "–"
    assert format.difference("accuracy", -0.0123) == "-1.2 pp"
    assert format.difference("bits_per_byte", 0.034) == "+0.0340"
    assert format.interval("accuracy", 0.801, 0.823) == "80.1% to 82.3%"


def test_words() -> None:
    assert [format.plural(1, "seed"), format.plural(1200, "seed")] == ["1 seed", "1,200 seeds"]
    assert format.plural(2, "strategy", "strategies") == "2 strategies"
    assert (
        format.trainable(294_912, 124_734_720) == "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    )


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-3, 1e12))
def test_at_most_five_digits(value: float) -> None:
    for text in (
        format.duration(min(value, 8e6)),
        format.memory(value),
        format.file_size(value),
        format.count(value),
        format.metric("loss", value / 1e9),
        format.metric("accuracy", value / 1e12),
    ):
        assert len(re.sub(r"\D", "", text)) <= 5, text
        assert "e" not in text
