"""Pages in headless Chromium: any width, light and dark, keyboard, contrast. `make browser` installs what this needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import page_runs
from helpers.page_reports import KINDS, report, stored
from helpers.pages import check
from helpers.runs import run, stop_at

from hfstrat.pages.render import render
from hfstrat.recipe.load import load_recipe
from hfstrat.run import page
from hfstrat.tasks.base import Pictures
from hfstrat.tasks.report import parse

pytestmark = pytest.mark.slow
WIDTHS = (360, 768, 1920)
ENOUGH, LARGE = 4.5, 3.0  # contrast of text (WCAG 2.2, 1.4.3), and of large or graphical parts (1.4.11)

# The contrast of each visible text with the color behind it: translucent backgrounds are blended.
CONTRAST = """
const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a] }
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]))
const light = color => color.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m); return (x + 0.05) / (y + 0.05) }
const behind = element => {
  const layers = []
  for (let each = element; each; each = each.parentElement) layers.unshift(parse(getComputedStyle(each).backgroundColor))
  return layers.reduce((under, layer) => over(layer, under), [255, 255, 255])
}
const found = []
for (const each of document.querySelectorAll('body *')) {
  const own = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  if (!own || each.closest('title, desc, .hidden') || !each.getClientRects().length) continue
  const style = getComputedStyle(each), isSvg = each instanceof SVGElement
  const color = parse(isSvg ? style.fill : style.color).slice(0, 3)
  found.push([ratio(color, behind(each)), each.tagName, each.textContent.slice(0, 30)])
}
const marks = [...document.querySelectorAll('svg [class^=s] > *, svg.mark > *')].filter(each => each.tagName !== 'title')
  .map(each => { const style = getComputedStyle(each); return style.fill === 'none' ? style.stroke : style.fill })
const card = behind(document.querySelector('figure') || document.body)
return [found, [...new Set(marks)].map(color => [ratio(parse(color).slice(0, 3), card), color])]
"""
WIDE = """
return [...document.querySelectorAll('body *')].filter(each => {
  const box = each.getBoundingClientRect()
  return box.width && !each.closest('.wide, pre, .skip, .hidden, svg') && (box.right > innerWidth + 0.5 || box.left < -0.5)
}).map(each => each.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    tools = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in tools.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: make browser")
    pytest.importorskip("selenium", reason="selenium is not installed: make browser")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = tools["chromium"] or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(tools["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def show(chromium: Any) -> Callable[..., None]:
    """`show(file, width, scheme)` opens a page; the console has to stay empty."""

    def open_page(file: Path, width: int = 1280, scheme: str = "light") -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get(file.as_uri())
        complaints = chromium.get_log("browser")
        assert not complaints

    return open_page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a report of each kind, and of one whose names are very long."""
    folder = tmp_path_factory.mktemp("pages")
    files = {kind: folder / f"{kind}.html" for kind in (*KINDS, "long")}
    jpeg = "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQH/wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AVN//2Q=="  # noqa: E501
    for kind in KINDS:
        shown = Pictures(jpeg, (jpeg,), (jpeg, jpeg)) if kind == "pictures" else Pictures()
        files[kind].write_text(render(page.page_of(report(kind), shown)))
    found = stored("classes") | {"schema_version": 1}
    word = "unbreakable" * 30
    for label in found["result"]["evaluation"]["labels"]:
        label["label"] += word
    found["result"]["answers"][0]["after"] = word
    found["run"]["data"]["train"]["source"] = word
    found["run"]["origins"] = {"output_dir": word, "seed": word}
    found["result"]["simple_models"][0]["name"] = word
    files["long"].write_text(render(page.page_of(parse(found), Pictures())))
    return files


@pytest.mark.parametrize("kind", [*KINDS, "long"])
def test_no_width_scrolls_sideways(chromium: Any, show: Any, pages: dict[str, Path], kind: str) -> None:
    """Tables scroll within themselves; all else fits."""
    for width in WIDTHS:
        show(pages[kind], width)
        assert chromium.execute_script("return innerWidth") == width
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        assert not chromium.execute_script(WIDE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["sft", "classes", "pictures", "grpo", "distill"])
def test_text_is_readable(chromium: Any, show: Any, pages: dict[str, Path], kind: str, scheme: str) -> None:
    show(pages[kind], scheme=scheme)
    chromium.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    texts, marks = chromium.execute_script(CONTRAST)
    assert len(texts) > 100
    assert not [each for each in texts if each[0] < ENOUGH]
    assert not [each for each in marks if each[0] < LARGE]
    chromium.execute_script("document.querySelector('h2').style.color = '#999'")
    assert [each for each in chromium.execute_script(CONTRAST)[0] if each[0] < ENOUGH] or scheme == "dark", (
        "it would be noticed"
    )
    dark = chromium.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert dark == (scheme == "dark")


def test_a_keyboard_reaches_everything_in_order(chromium: Any, show: Any, pages: dict[str, Path]) -> None:
    """The first Tab offers to skip the contents; each focus is visible, and the order is that of the page."""
    from selenium.webdriver import ActionChains, Keys

    show(pages["classes"])
    wanted = "a[href], summary, [tabindex='0']"
    count = len(
        chromium.execute_script(f"return [...document.querySelectorAll({wanted!r})].filter(each => each.checkVisibility())")
    )
    where = "const all = [...document.querySelectorAll('*')]; return all.indexOf(document.activeElement)"
    outline = "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]"
    places = []
    for number in range(count):
        ActionChains(chromium).send_keys(Keys.TAB).perform()
        places.append(chromium.execute_script(where))
        style, width = chromium.execute_script(outline)
        assert style == "solid"
        assert width >= 2
        if number == 0:
            box = "const b = document.activeElement.getBoundingClientRect(); return [b.left >= 0, b.top >= 0]"
            assert chromium.execute_script("return document.activeElement.textContent") == "Skip to the content"
            assert chromium.execute_script(box) == [True, True]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    show(pages["classes"])
    ActionChains(chromium).send_keys(Keys.TAB).send_keys(Keys.ENTER).perform()
    assert chromium.execute_script("return document.activeElement.id") == "content"


def test_a_screen_reader_finds_names(chromium: Any, show: Any, pages: dict[str, Path]) -> None:
    """The browser's own accessibility tree: landmarks, charts with names and descriptions, tables with names."""
    show(pages["classes"])
    nodes = chromium.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        if not node.get("ignored"):
            kinds.setdefault(node.get("role", {}).get("value", ""), []).append(node)
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert len(kinds[role]) == 1, role
    name = lambda node: node.get("name", {}).get("value", "")  # noqa: E731
    drawings = [node for role in ("image", "img") for node in kinds.get(role, [])]
    assert len(drawings) >= 5
    for node in [*drawings, *kinds["table"], *kinds["region"]]:
        assert name(node)
    assert all(node.get("description", {}).get("value") for node in drawings)


def test_the_page_of_a_search_and_of_a_comparison_are_in_the_same_style(chromium: Any, show: Any, tmp_path: Path) -> None:
    """No sideways scrolling and no console messages; their content has tests of its own."""
    from hfstrat.pages.blocks import Bar, Bars, Cell, Charts, Page, Row, Section, Table
    from hfstrat.pages.charts import Point, plain_tick, scatter

    points = [Point(f"candidate {n}", n, 10.0 * n + 1, 0.5 + n / 20, 0.4, 0.9, n > 2) for n in range(8)]
    drawn = scatter("Quality over time", ("time", "accuracy"), points, True, (plain_tick, plain_tick))
    head = ["", *(Cell(f"candidate {n}", mark=n) for n in range(8))]
    cells = [Cell("0.5", best=n == 3, folded="sources" if n == 5 else "") for n in range(8)]
    rows = [Row(["accuracy", *cells], "lead first", True)]
    blocks = [Charts([drawn], [(n, f"candidate {n}") for n in range(8)]), Table("Side by side", head, rows, "sheet")]
    found = Page("a search", [Section("All", [*blocks, Bars([("all", [Bar("rate", "60%", 0.6)])])])])
    file = tmp_path / "search.html"
    file.write_text(render(found))
    check(file.read_text())
    for width in WIDTHS:
        show(file, width)
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        show(file, scheme=scheme)
        texts, marks = chromium.execute_script(CONTRAST)
        assert not [each for each in texts if each[0] < ENOUGH]
        assert len(marks) == 8
        assert not [each for each in marks if each[0] < LARGE]


def test_an_interrupted_run_has_a_page_and_keeps_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows how far the run came; the page of the resumed run has the throughput of both sessions."""
    file, *overrides = page_runs.sft(tmp_path)
    loaded = load_recipe(file, overrides)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            run(loaded)
    folder = Path(loaded.recipe.output_dir)
    stopped = check((folder / "report.html").read_text())
    assert "The run was interrupted." in stopped.words
    assert "Gradient norm" in stopped.words
    assert str(tmp_path) not in stopped.text
    result = run(loaded)["result"]
    assert [one["step"] for one in result["speeds"]] == [one["step"] for one in result["losses"]] == list(range(1, 13))
    assert all({"learning_rate", "grad_norm"} <= set(one) for one in result["losses"])
    check((folder / "report.html").read_text())


@pytest.mark.parametrize("kind", ["sft", "classes", "head", "numbers", "pictures", "dpo", "grpo"])
def test_real_runs_have_pages(tmp_path: Path, kind: str) -> None:
    """A short run of each kind writes a page that keeps the laws; needs no browser."""
    folder = page_runs.make(kind, tmp_path / "made")
    text = (folder / "report.html").read_text()
    found = check(text)
    assert str(tmp_path) not in text
    titles = [content for tag, content in found.parts if tag == "h2"]
    assert titles[0] == "Result"
    assert {"Before and after", "Metrics", "Examples as the model sees them", "Data"} <= set(titles)
    if kind in ("sft", "dpo", "kto"):
        assert len(found.named("mark")) >= 3, "three rows with their masks"
    if kind == "pictures":
        assert len(found.named("img")) >= 3
