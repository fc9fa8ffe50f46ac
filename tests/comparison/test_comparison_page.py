"""report.html: one self-contained file that any browser shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.comparisons import Played
from helpers.comparisons import request as compare_request
from helpers.pages import check, read
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.comparison import page
from hfstrat.pages import charts
from hfstrat.pages.charts import Point
from hfstrat.recipe import format

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "headless_shell")


@pytest.fixture(params=["words", "classes"])
def table(request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, rows: Path) -> dict[str, Any]:
    """A comparison in which one run is out of memory."""
    from helpers.classifiers import labeled, make_encoder

    monkeypatch.chdir(tmp_path)
    classes = request.param == "classes"
    played = Played(monkeypatch, classes)
    played.endings = {("partial", 43): ("out-of-memory", "killed (signal 9) & gone")}
    model, data = (make_encoder(tmp_path / "model", "bert"), labeled(tmp_path)) if classes else (tiny, rows)
    return played.compare(compare_request(tmp_path / "out", model=str(model), data=str(data), seeds=3))


def test_it_is_complete_and_loads_nothing(table: dict[str, Any]) -> None:
    text = page.render(table)
    check(text)
    assert not re.findall(r"https?:", text)


def test_it_shows_everything(table: dict[str, Any]) -> None:
    """Each recipe in each table and chart, failures with the reason, answers as text and not as markup."""
    text = page.render(table)
    output = read(text).words
    assert "partial, seed 43: out of memory: killed (signal 9) & gone" in output
    assert "2 of 3: out of memory" in output
    assert "Once <b>upon</b> a time" in output
    for row in table["entries"]:
        assert f"{row['label']} answers & more" in output
    assert text.count("<figure>") == 4
    assert ("Confusion matrices" in output) == (table["task"] == "text-classification")
    assert page.without_paths(table)["repeat"]["command"] in output
    assert table["repeat"]["folder"] not in output  # a page is shared: it names nothing local
    assert str(Path(table["entries"][0]["runs"][0]["folder"]).parent) not in output
    assert "prefers-color-scheme: dark" in text
    if table["excluded"]:
        assert "distill is excluded" in output


def test_a_page_without_measurements(table: dict[str, Any]) -> None:
    for row in table["entries"]:
        for name in ("quality", "over_seeds", "over_rows", "before", "seconds", "peak_memory_bytes", "tokens_per_second"):
            row[name] = None
        row |= {"front": {}, "against_best": None, "runs": [{**run, "status": "waiting", "curve": []} for run in row["runs"]]}
    empty = {**table, "best": None, "samples": [], "confusions": {}, "environment": {}}
    assert "<figure>" not in page.render(empty)
    check(page.render(empty))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(1e-3, 1e7), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_and_has_some_ticks(values: list[float], from_zero: bool, is_time: bool) -> None:
    found = charts.axis(values, 50, 350, 8.0, from_zero, is_time)
    places = [found.at(value) for value in sorted(values)]
    assert all(50 <= place <= 350 for place in places)
    assert places == sorted(places)
    ticks = found.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(50 - 1e-6 <= found.at(tick) <= 350 + 1e-6 for tick in ticks)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 1e6), st.floats(0.001, 3))
def test_no_two_ticks_of_an_axis_read_alike(least: float, spread: float) -> None:
    """And each reads as the time at its place, rounded as times are."""
    points = [Point(str(n), n, x, x / 9, None, None) for n, x in enumerate((least, least * (1 + spread)))]
    drawn = charts.scatter("t", ("time", "quality"), points, True, (format.duration, lambda value: f"{value:.1f}"))
    ticks = re.findall(r'<text class="tick" x="([-\d.]+)" y="([-\d.]+)"[^>]*>([^<]*)<', drawn)
    for axis in (0, 1):
        texts = [text for *place, text in ticks if place[axis] == ticks[0 if axis else -1][axis]]
        assert len(texts) == len(set(texts)), texts


SPOT = st.tuples(st.floats(1, 1000), st.floats(0.2, 9), st.booleans())


@settings(max_examples=100, deadline=None)
@given(st.lists(SPOT, min_size=1, max_size=8))
def test_no_label_covers_another(spots: list[tuple[float, float, bool]]) -> None:
    points = [Point(f"recipe-{n}", n, x, y, y * 0.95, y * 1.05, on) for n, (x, y, on) in enumerate(spots)]
    drawn = charts.scatter("t", ("time", "loss"), points, False, (str, str))
    read(drawn)
    labels = re.findall(r'<text class="name" x="([-\d.]+)" y="([-\d.]+)">([^<]*)<', drawn)
    boxes = [(float(x), float(y), float(x) + charts.CHARACTER * len(text), float(y) + 10) for x, y, text in labels]
    for number, one in enumerate(boxes):
        assert one[0] >= charts.LEFT
        assert one[2] <= charts.WIDTH
        for other in boxes[:number]:
            near = 0.2  # positions are rounded
            assert one[2] <= other[0] + near or other[2] <= one[0] + near or one[3] <= other[1] or other[3] <= one[1]


# in a browser

WIDTH = """<script>addEventListener('load', () => {
  const page = document.documentElement; parent.postMessage(`${innerWidth}, ${page.scrollWidth - page.clientWidth} over`, '*')
})</script>"""
FRAME = """<body><script>addEventListener('message', e => document.title = e.data)</script>
<iframe src="{name}" width="360" height="2000" style="border:0"></iframe></body>"""


@pytest.fixture(scope="module")
def browser() -> Any:
    """`browser(file, *options)` opens a page; returns its document and the messages on the console."""
    tool = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if tool is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")

    def get(file: Path, *options: str) -> tuple[str, list[str]]:
        command = [
            str(tool),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--log-level=0",
            *options,
        ]
        command += ["--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    return get


@pytest.mark.slow
def test_a_browser_reports_no_errors(browser: Any, table: dict[str, Any], tmp_path: Path) -> None:
    """In light, dark and narrow windows; a page with a forbidden image shows that the test would notice."""
    file = tmp_path / "out" / "report.html"
    for options in ((), ("--blink-settings=preferredColorScheme=0",), ("--window-size=360,800",)):
        document, complaints = browser(file, *options)
        assert "Side by side" in document
        assert not complaints
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(file.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    assert browser(spoilt)[1]


@pytest.mark.slow
def test_a_narrow_window_scrolls_only_vertically(browser: Any, table: dict[str, Any], tmp_path: Path) -> None:
    text = page.render(table).replace("default-src 'none'; style-src 'unsafe-inline'", "default-src * 'unsafe-inline'")
    (tmp_path / "inner.html").write_text(text.replace("</body>", f"{WIDTH}</body>"))
    (tmp_path / "outer.html").write_text(FRAME.format(name="inner.html"))
    document, _ = browser(tmp_path / "outer.html")
    assert "<title>360, 0 over</title>" in document
