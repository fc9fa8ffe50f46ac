"""Small charts as SVG text: no library, no script; the colors are those of the page's style, for light and dark mode."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from hfstrat.recipe import format

WIDTH, HEIGHT = 380.0, 270.0  # units; a character is about 6.4 wide, readable even at 320 pixels
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 12.0, 40.0
CHARACTER, LINE = 6.4, 13.0
TICKS = 5  # per axis, roughly
COLORS = 8  # of the page's style
MOST_POINTS = 240  # of a line; of more the lowest and the highest of each stretch are drawn
MARKED = 40  # points of a line that still have a marker each
Format = Callable[[float], str]
TIME = "time"  # an axis of this name is in seconds
WHOLE_SECONDS = 10.0  # from here on times are shown without decimals
MINUTE = 60.0
HOUR = 60 * MINUTE
TIMES = [1, 2, 5, 10, 15, 30, *(n * MINUTE for n in (1, 2, 5, 10, 15, 30)), *(n * HOUR for n in (1, 2, 4, 8, 24, 48))]


@dataclass(frozen=True)
class Axis:
    """Maps numbers to positions. `low` and `high` are its ends, both above 0 on a logarithmic axis."""

    low: float
    high: float
    start: float  # the position of `low`
    stop: float
    is_log: bool = False
    is_time: bool = False  # in seconds: ticks at full minutes and hours

    def at(self, value: float) -> float:
        low, high, value = (math.log10(each) if self.is_log else each for each in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """A few round numbers on the axis."""
        return (_log_ticks if self.is_log else _linear_ticks)(self.low, self.high, self.is_time)


def axis(
    values: Sequence[float], start: float, stop: float, wide: float, from_zero: bool = False, is_time: bool = False
) -> Axis:
    """An axis for all values; logarithmic if the largest is more than `wide` times the smallest."""
    low, high = min(values), max(values)
    if low > 0 and high / low > wide:
        return Axis(low / 1.15, high * 1.15, start, stop, True, is_time)
    if from_zero and low >= 0 and low < 0.6 * high:
        return Axis(0.0, high * 1.06, start, stop, False, is_time)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, start, stop, False, is_time)


def _linear_ticks(low: float, high: float, is_time: bool) -> list[float]:
    wanted = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    if is_time and (wanted > TIMES[0] or (high >= WHOLE_SECONDS and high - low >= 2)):
        step = next((longer for longer in TIMES if longer >= wanted), step)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, first + 12) if n * step <= high * (1 + 1e-9) + 1e-12]


def _log_ticks(low: float, high: float, is_time: bool) -> list[float]:
    if high / low < 10:
        return _linear_ticks(low, high, is_time)
    found = [each for each in TIMES if low <= each <= high] if is_time else []
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for digits in ((1, 2, 5), (1, 3), (1,)) if len(found) < 2 else ():
        found = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
        if len(found) <= 6:
            break
    return found[:: math.ceil(len(found) / 6)]


@dataclass(frozen=True)
class Curve:
    """Lines of one color, one per seed: `(x, y)` from left to right."""

    label: str
    number: int
    lines: list[list[tuple[float, float]]]


@dataclass(frozen=True)
class Point:
    """A measured value with its interval."""

    label: str
    number: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    on_front: bool = False


def thinned(line: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """The finite points of a line; of more than `most` the first, the last, and the extremes of equal stretches."""
    line = [point for point in line if all(map(math.isfinite, point))]
    if len(line) <= most:
        return line
    places = {0, len(line) - 1}
    stretches = max(1, most // 2 - 1)
    for number in range(stretches):
        stretch = range(number * len(line) // stretches, (number + 1) * len(line) // stretches)
        places |= {min(stretch, key=lambda at: line[at][1]), max(stretch, key=lambda at: line[at][1])}
    return [line[at] for at in sorted(places)]


def curves(title: str, names: tuple[str, str], found: list[Curve], show: tuple[Format, Format], logs: bool = True) -> str:
    """Lines over time, steps or tokens; empty without points. `logs`: of a wide range the axis is logarithmic."""
    kept = [Curve(curve.label, curve.number, [thin for line in curve.lines if (thin := thinned(line))]) for curve in found]
    found = [curve for curve in kept if curve.lines]
    points = [point for curve in found for line in curve.lines for point in line]
    if not points:
        return ""
    across = axis([x for x, _ in points], LEFT, WIDTH - RIGHT, 1e9, from_zero=True, is_time=names[0] == TIME)
    up = axis([y for _, y in points], HEIGHT - BOTTOM, TOP, 2.5 if logs else math.inf)
    body = []
    for curve in found:
        color = f"s{curve.number % COLORS}"
        for line in curve.lines:
            places = [(across.at(x), up.at(y)) for x, y in line]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            hint = "; ".join(f"{show[0](x)}: {show[1](y)}" for x, y in line[:: math.ceil(len(line) / MARKED)])
            body.append(f'<g class="{color}"><title>{escape(curve.label)}: {escape(hint)}</title>')
            marked = places if len(places) <= MARKED else [places[-1]]
            body.append(f'<polyline points="{path}"/>{"".join(marker(curve.number, *place, 2.6) for place in marked)}</g>')
    return _chart(title, names, across, up, show, body, [_told(curve, names[0], show) for curve in found])


def _told(curve: Curve, axis: str, show: tuple[Format, Format]) -> str:
    """A curve in words: where it begins and ends, and its extremes."""
    points = [point for line in curve.lines for point in line]
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{curve.label}: {show[1](start)} at {axis} {show[0](first)}"
    low, high = (pick(points, key=lambda point: point[1]) for pick in (min, max))
    return (
        f"{curve.label}: from {show[1](start)} at {axis} {show[0](first)} to {show[1](end)} at {show[0](last)}, "
        f"lowest {show[1](low[1])} at {show[0](low[0])}, highest {show[1](high[1])} at {show[0](high[0])}"
    )


def scatter(title: str, names: tuple[str, str], found: list[Point], higher_is_better: bool, show: tuple[Format, Format]) -> str:
    """Quality over a cost, with intervals and the Pareto front as a line; empty without points."""
    if not found:
        return ""
    across = axis([point.x for point in found], LEFT, WIDTH - RIGHT, 8.0, from_zero=True, is_time=names[0] == TIME)
    centers = [point.y for point in found]
    reach = max(max(centers) - min(centers), 0.02 * abs(max(centers, key=abs)), 1e-6)  # the interval of two seeds may be huge
    lows = [max(point.y - reach, point.y if point.low is None else point.low) for point in found]
    highs = [min(point.y + reach, point.y if point.high is None else point.high) for point in found]
    up = axis([*lows, *highs], HEIGHT - BOTTOM, TOP, 1e9 if higher_is_better else 2.0)
    steps = sorted((across.at(point.x), up.at(point.y)) for point in found if point.on_front)
    body = [_front(steps)]
    taken = [(across.at(p.x) - 6, up.at(p.y) - 6, across.at(p.x) + 6, up.at(p.y) + 6) for p in found]
    for (left, top), (right, bottom) in itertools.pairwise(steps):
        taken += [(left, top - 1, right, top + 1), (right - 1, min(top, bottom), right + 1, max(top, bottom))]
    for point in found:
        x, y = across.at(point.x), up.at(point.y)
        body.append(f'<g class="s{point.number % COLORS}"><title>{escape(_hint(point, show))}</title>')
        if point.low is not None and point.high is not None:
            body.append(
                f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{up.at(point.low):.1f}" y2="{up.at(point.high):.1f}"/>'
            )
        body.append(f"{marker(point.number, x, y, 5)}</g>")
        body.append(_label(point.label, x, y, taken))
    better = "higher is better" if higher_is_better else "lower is better"
    return _chart(title, (names[0], f"{names[1]}, {better}"), across, up, show, body, [_hint(point, show) for point in found])


def agreement(title: str, names: tuple[str, str], points: Sequence[tuple[float, float]], show: Format) -> str:
    """What is predicted over what is true, with the line on which both are equal; empty without points."""
    found = [point for point in points if all(map(math.isfinite, point))]
    if not found:
        return ""
    values = [value for point in found for value in point]
    across, up = axis(values, LEFT, WIDTH - RIGHT, math.inf), axis(values, HEIGHT - BOTTOM, TOP, math.inf)
    ends = [f"{across.at(end):.1f},{up.at(end):.1f}" for end in (across.low, across.high)]
    body = [f'<path class="front" d="M{ends[0]}L{ends[1]}"/>', '<g class="s0 dots">']
    body += [f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="2.6"/>' for x, y in found]
    worst = max(found, key=lambda point: abs(point[0] - point[1]))
    told = f"{len(found)} examples; the largest error is {show(worst[1])} instead of {show(worst[0])}"
    return _chart(title, names, across, up, (show, show), [*body, "</g>"], [told])


def histogram(title: str, names: tuple[str, str], ends: tuple[float, float], counts: Sequence[int], show: Format) -> str:
    """Counts in intervals of equal width between the ends; empty without any."""
    if not any(counts) or ends[1] <= ends[0]:
        return ""
    across, up = Axis(*ends, LEFT, WIDTH - RIGHT), Axis(0.0, 1.06 * max(counts), HEIGHT - BOTTOM, TOP)
    width, body = (ends[1] - ends[0]) / len(counts), ['<g class="s0">']
    for number, count in enumerate(counts):
        left, right = (ends[0] + place * width for place in (number, number + 1))
        x, y, floor = across.at(left), up.at(count), HEIGHT - BOTTOM
        hint = f"{show(left)} to {show(right)}: {count:,}"
        size = f'width="{max(across.at(right) - x - 1, 0.5):.1f}" height="{floor - y:.1f}"'
        body.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size}><title>{escape(hint)}</title></rect>')
    most = max(range(len(counts)), key=lambda at: counts[at])
    told = f"from {show(ends[0])} to {show(ends[1])}; most, {counts[most]:,}, from {show(ends[0] + most * width)} on"
    return _chart(title, names, across, up, (show, format.count), [*body, "</g>"], [told])


def _hint(point: Point, show: tuple[Format, Format]) -> str:
    interval = "" if point.low is None or point.high is None else f" ({show[1](point.low)} to {show[1](point.high)})"
    return f"{point.label}: {show[1](point.y)}{interval} at {show[0](point.x)}{', Pareto-optimal' if point.on_front else ''}"


def _front(places: list[tuple[float, float]]) -> str:
    """Steps from the cheapest to the best: the quality that a cost buys."""
    if len(places) < 2:
        return ""
    path = f"M{places[0][0]:.1f},{places[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    return f'<path class="front" d="{path}"/>'


def _label(text: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """A label next to its point where it covers nothing; empty if there is no such place (the legend has it)."""
    wide = CHARACTER * len(text)
    places = [(x + 9, y), (x - 9 - wide, y), (x + 5, y - 12), (x + 5, y + 13), (x - 5 - wide, y - 12), (x - 5 - wide, y + 13)]
    for left, middle in places:
        box = (left, middle - LINE / 2, left + wide, middle + LINE / 2)
        inside = box[0] >= LEFT + 2 and box[2] <= WIDTH - 2 and box[1] >= 1 and box[3] <= HEIGHT - BOTTOM - 1
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return f'<text class="name" x="{left:.1f}" y="{middle + 4:.1f}">{escape(text)}</text>'
    return ""


CROSS = ((1.25, 0.45), (0.45, 0.45), (0.45, 1.25))  # the corners of a quarter of a cross


def marker(number: int, x: float, y: float, r: float) -> str:
    """A different shape for each number, for readers who cannot distinguish the colors."""
    kind = number % 6
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    if kind == 1:
        return f'<rect x="{x - 0.9 * r:.1f}" y="{y - 0.9 * r:.1f}" width="{1.8 * r:.1f}" height="{1.8 * r:.1f}"/>'
    shapes = {
        2: [(0, -1.2), (1.15, 0.8), (-1.15, 0.8)],
        3: [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        4: [(-1.15, -0.8), (1.15, -0.8), (0, 1.2)],
        5: [(a * t, b * u) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1)) for t, u in CROSS[:: int(a * b)]],
    }
    return '<polygon points="' + " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in shapes[kind]) + '"/>'


def slug(title: str) -> str:
    """A title as an id."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _chart(
    title: str,
    names: tuple[str, str],
    across: Axis,
    up: Axis,
    show: tuple[Format, Format],
    body: list[str],
    told: list[str],
) -> str:
    """The frame of a chart with ticks and names; `told` is its content in words. A title is for one chart of a page."""
    name = f"chart-{slug(title)}"
    parts = ["<figure>", f'<figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img"']
    parts.append(f' aria-labelledby="{name}" aria-describedby="{name}-told"><title id="{name}">{escape(title)}</title>')
    parts.append(f'<desc id="{name}-told">{escape(f"{names[1]} over {names[0]}. " + "; ".join(told))}.</desc>')
    floor = HEIGHT - BOTTOM
    last, shown = -1e9, set[str]()
    for value in across.ticks():
        x, text = across.at(value), show[0](value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:g}" y2="{floor:g}"/>')
        half = CHARACTER * len(text) / 2
        place = min(x, WIDTH - 2 - half)
        if place - half > last + 4 and text not in shown:
            shown.add(text)
            parts.append(f'<text class="tick" x="{place:.1f}" y="{floor + 15:g}" text-anchor="middle">{escape(text)}</text>')
            last = place + half
    shown.clear()
    for value in up.ticks():
        y, text = up.at(value), show[1](value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if text not in shown:  # rounded alike on an axis of a small range
            parts.append(f'<text class="tick" x="{LEFT - 5:g}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        shown.add(text)
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 5:g}" text-anchor="middle">')
    parts.append(f"{escape(names[0])}{' (log)' if across.is_log else ''}</text>")
    parts.append(f'<text class="axis" transform="translate(11 {(TOP + floor) / 2:g}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(names[1])}{' (log)' if up.is_log else ''}</text>")
    return "".join([*parts, *body, "</svg></figure>"])


# labels of the ticks of an axis


def time_tick(seconds: float) -> str:
    return format.duration(seconds).replace(".0s", "s").replace(" 00s", "").replace(" 00m", "") if seconds else "0"


def plain_tick(value: float) -> str:
    return f"{value:.3g}"


def number_tick(value: float) -> str:
    """A number in units of its own, such as a year, of which the last digits count."""
    return f"{value:.6g}"


def quality_tick(value: float, metric: str) -> str:
    return f"{100 * value:.3g}%" if format.is_share(metric) else plain_tick(value)
