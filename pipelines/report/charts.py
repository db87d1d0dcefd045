"""Texts and charts for a page: users' text made harmless, numbers as inline SVG.

Each has a title and a description for those who do not see it. Colours come from the stylesheet, so
that they follow the page into the dark; nothing depends on colour alone. No attribute is a style:
the page's policy forbids them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

MOST = 4000  # characters of any one text on a page, whatever it is
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(value: object) -> object:
    """A text that can stand anywhere on a page; no text, or markup of our own, stays as it is."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) or not isinstance(value, str) else shown(value)


def shown(text: str, most: int = MOST) -> str:
    """At most so many characters, with signs for what a browser would not show or would obey."""
    kept = text[:most]
    kept = _CONTROLS.sub(lambda match: _sign(match[0]), kept)
    kept = _TURNING.sub(lambda match: f"[U+{ord(match[0]):04X}]", kept)
    kept = _SURROGATES.sub("\ufffd", kept)
    return (
        kept
        if len(text) <= most
        else f"{kept}\u2026 [cut: {most:,} of {len(text):,} characters shown]"
    )


def short(text: str, most: int) -> str:
    """For labels in charts: the end goes, with an ellipsis."""
    kept = shown(text.replace("\n", " "), MOST)
    return kept if len(kept) <= most else kept[: most - 1] + "\u2026"


def compact(number: float) -> str:
    """A number in few characters: 950, 1.2k, 34k, 5.6M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            value = number / size
            return f"{value:.1f}{unit}" if abs(value) < 9.95 else f"{value:.0f}{unit}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"


def percent(share: float) -> str:
    """With as many digits as it takes to tell it from 0 and from all."""
    if share <= 0 or share >= 1 or 0.0995 <= share <= 0.9005:
        return f"{share * 100:.0f} %" if share in (0, 1) else f"{share * 100:.1f} %"
    return (
        f"{share * 100:.1f} %"
        if 0.0005 <= share <= 0.9995
        else ("< 0.1 %" if share < 0.5 else "> 99.9 %")
    )


def duration(seconds: float) -> str:
    """2.4 s, 3 min 20 s, 5 h 02 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02d} s"
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _sign(char: str) -> str:
    """The Unicode picture of a control character."""
    code = ord(char)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"[U+{code:04X}]"


Y_TICKS = 4
BESIDE = 9.0  # between points of groups that cost the same
CHAR = 7.0  # the width of a character of a chart's text
TOP, RIGHT, BOTTOM, LEFT = 32, 22, 42, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The plotting area of a chart and its scales; `log_x` takes logarithms of x first."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False

    def px(self, value: float) -> float:
        low, high = self.x
        if self.log_x:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return LEFT + (value - low) / ((high - low) or 1.0) * (self.width - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        share = (value - low) / ((high - low) or 1.0)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of a scatter plot with its interval in y, and the name that stands beside it."""

    x: float
    y: float
    low: float
    high: float
    name: str
    group: int = 0


def bar(share: float, second: float | None = None) -> Markup:
    """A horizontal bar for a table's cell; `second` is a thinner one below it."""
    top, height = (2, 8) if second is None else (0, 7)
    body = _rect("bar", 0, top, 100 * _within(share), height)
    if second is not None:
        body += _rect("bar-gold", 0, 8, 100 * _within(second), 3.5)
    return Markup(
        '<svg class="barcell" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        "{}</svg>"
    ).format(body)


def stacked_bar(parts: Sequence[tuple[str, float]], title: str) -> Markup:
    """One bar of several parts (class, number)."""
    total = sum(value for _, value in parts) or 1.0
    body, left = Markup(), 0.0
    for name, value in parts:
        body += _rect(name, left * 100, 0, value / total * 100, 16)
        left += value / total
    return Markup(
        '<svg class="stackbar" viewBox="0 0 100 16" preserveAspectRatio="none" role="img">'
        "<title>{}</title>{}</svg>"
    ).format(title, body)


def interval(value: float, low: float, high: float, scale: tuple[float, float]) -> Markup:
    """A value with its interval on a small line, for a table's cell."""
    span = (scale[1] - scale[0]) or 1.0
    at, start, stop = ((each - scale[0]) / span * 96 + 2 for each in (value, low, high))
    return Markup(
        '<svg class="intervalcell" viewBox="0 0 100 12" aria-hidden="true">{}'
        '<circle class="dot" cx="{:.1f}" cy="6" r="3.4"/></svg>'
    ).format(_line("whisker", start, 6, stop, 6), at)


def histogram(
    stacks: Sequence[Sequence[float]], edges: Sequence[float], *, title: str, x_name: str
) -> Markup:
    """Bars over [edges]; `stacks` are the heights of right, wrong and other rows for each bar."""
    heights = [sum(stack) for stack in stacks]
    highest = max(heights, default=1)
    frame = Frame(width=420, height=230, x=(edges[0], edges[-1]), y=(0, _ceiling(highest)))
    body = _y_axis(frame, compact)
    body += _x_axis(frame, x_name, {value: compact(value) for value in ticks(*frame.x)})
    for stack, low, high in zip(stacks, edges[:-1], edges[1:], strict=True):
        gap, base = 1.0 if high - low < edges[-1] - edges[0] else 0.0, 0.0
        left, right = frame.px(low) + gap, frame.px(high) - gap
        for name, value in zip(("right", "wrong", "other"), stack, strict=False):
            if value > 0:
                # What is there must be seen, however small.
                top, bottom = min(frame.py(base + value), frame.py(base) - 1.5), frame.py(base)
                body += _rect(name, left, top, right - left, bottom - top)
                base += value
    told = f"{compact(sum(heights))} in {len(heights)} bars; the highest has {compact(highest)}."
    return _svg(frame, title, told, body)


def reliability(points: Sequence[tuple[float, float, float, float, int]], *, title: str) -> Markup:
    """(confidence, accuracy, low, high, rows) of each bin against perfect calibration."""
    frame = Frame(width=420, height=340, x=(0, 1), y=(0, 1))
    body = _y_axis(frame, lambda value: f"{value * 100:.0f} %")
    body += _x_axis(frame, "confidence", {x: f"{x * 100:.0f} %" for x in ticks(0, 1)})
    body += _line("diagonal", frame.px(0), frame.py(0), frame.px(1), frame.py(1))
    most = max((rows for *_, rows in points), default=1)
    for confidence, accuracy, low, high, rows in points:
        x = frame.px(confidence)
        body += _line("gap", x, frame.py(confidence), x, frame.py(accuracy))
        body += _line("whisker", x, frame.py(low), x, frame.py(high))
        body += Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(
            x, frame.py(accuracy), 3 + 6 * math.sqrt(rows / most)
        )
    body += _text("axis-name", 4, 14, "accuracy", "start")
    told = "; ".join(
        f"{rows} rows at {percent(sure)} are {percent(right)} right"
        for sure, right, _, _, rows in points
    )
    return _svg(frame, title, told or "No rows.", body)


def throughput(
    edges: Sequence[float],
    rates: Sequence[float],
    *,
    title: str,
    mean: float,
    pauses: Sequence[tuple[float, str]] = (),
    stalls: Sequence[tuple[float, float]] = (),
    width: int = 860,
) -> Markup:
    """Rows per second over seconds of work. A pause is a line where it lies, a stall is shaded."""
    highest = _ceiling(max(rates, default=1.0))
    frame = Frame(width=width, height=250, x=(0, edges[-1]), y=(0, highest))
    floor, end = frame.py(0), frame.px(edges[-1])
    body = _y_axis(frame, compact)
    for start, stop in stalls:
        left, right = frame.px(start), frame.px(stop)
        body += _rect("stall", left, TOP, max(right - left, 2), floor - TOP)
    steps = [(frame.px(0), floor)]
    for low, high, rate in zip(edges[:-1], edges[1:], rates, strict=True):
        steps += [(frame.px(low), frame.py(rate)), (frame.px(high), frame.py(rate))]
    body += Markup('<path class="area" d="M{}Z"/>').format(_path([*steps, (end, floor)]))
    body += _line("mean", frame.px(0), frame.py(mean), end, frame.py(mean))
    body += _text("mean-name", end, frame.py(mean) - 5, f"mean {compact(mean)} rows/s", "end")
    for place, name in pauses:
        x = frame.px(place)
        aside, anchor = (4, "start") if x < width / 2 else (-4, "end")
        body += _line("pause", x, TOP, x, floor)
        body += _text("axis-name", x + aside, TOP + 10, name, anchor)
    names = {value: _clock(value, edges[-1]) for value in _time_ticks(edges[-1])}
    body += _x_axis(frame, "time of work", names)
    body += _text("axis-name", 4, 14, "rows/s", "start")
    least, most = compact(min(rates, default=0)), compact(max(rates, default=0))
    told = f"Between {least} and {most} rows/s, mean {compact(mean)}."
    return _svg(frame, title, told, body)


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_name: str,
    y_name: str,
    frontier: Sequence[tuple[float, float]] = (),
    width: int = 860,
) -> Markup:
    """Points with intervals over a logarithmic x; `frontier` joins those that nothing beats."""
    xs = [point.x for point in points]
    low, high = min(point.low for point in points), max(point.high for point in points)
    pad = max((high - low) * 0.08, 0.005)
    y = max(low - pad, 0.0), min(high + pad, 1.0)
    frame = Frame(width=width, height=330, x=(min(xs) / 1.15, max(xs) * 1.2), y=y, log_x=True)
    body = _y_axis(frame, lambda value: f"{value * 100:.4g} %")
    body += _x_axis(frame, x_name, {value: compact(value) for value in _log_ticks(*frame.x)})
    if len(frontier) > 1:
        path = _path([(frame.px(at), frame.py(value)) for at, value in frontier])
        body += Markup('<path class="frontier" d="M{}"/>').format(path)
    last = max(point.group for point in points)
    for point in points:  # those of the same cost stand side by side
        x = frame.px(point.x) + BESIDE * (point.group - last / 2)
        whisker = f"whisker group-{point.group}"
        body += _line(whisker, x, frame.py(point.low), x, frame.py(point.high))
        body += _marker(point.group, x, frame.py(point.y))
    taken: list[tuple[float, float]] = []
    for point in points:  # a name is moved aside where another one stands already
        x, at = frame.px(point.x) + 8 + BESIDE * last / 2, frame.py(point.y) + 4
        space = CHAR * (len(point.name) + 1)
        while any(abs(x - left) < space and abs(at - top) < 12 for left, top in taken):
            x += space
        taken.append((x, at))
        body += _text("point-name", x, at, point.name, "start")
    body += _text("axis-name", 4, 14, y_name, "start")
    told = "; ".join(f"{point.name}: {percent(point.y)} at {compact(point.x)}" for point in points)
    return _svg(frame, title, told, body)


def _marker(group: int, x: float, y: float) -> Markup:
    """A shape for each group, so that colour is not needed."""
    sides = (0, 4, 3, 5)[group % 4]
    if not sides:
        return Markup('<circle class="dot group-{}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(
            group % 4, x, y
        )
    turns = [2 * math.pi * k / sides - math.pi / 2 for k in range(sides)]
    corners = " ".join(
        f"{x + 5.5 * math.cos(turn):.1f},{y + 5.5 * math.sin(turn):.1f}" for turn in turns
    )
    return Markup('<polygon class="dot group-{}" points="{}"/>').format(group % 4, corners)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers in [low, high], about as many as wanted."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _ceiling(value: float) -> float:
    found = ticks(0, value or 1.0, Y_TICKS)
    step = found[1] if len(found) > 1 else value or 1.0
    return step * math.ceil((value or 1.0) / step - 1e-9)


def _y_axis(frame: Frame, name: Callable[[float], str]) -> Markup:
    body = Markup()
    for value in ticks(*frame.y, Y_TICKS):
        y = frame.py(value)
        body += _line("grid", LEFT, y, frame.width - RIGHT, y)
        body += _text("tick", LEFT - 6, y + 4, name(value), "end")
    return body


def _x_axis(frame: Frame, name: str, names: Mapping[float, str]) -> Markup:
    """`names` are those of the values that get a tick."""
    bottom, right = frame.height - BOTTOM, frame.width - RIGHT
    body = _line("axis", LEFT, bottom, right, bottom)
    for value, told in names.items():
        body += _text("tick", frame.px(value), bottom + 16, told, "middle")
    if name:
        body += _text("axis-name", (LEFT + right) / 2, frame.height - 6, name, "middle")
    return body


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    every = (factor * 10.0**exponent for exponent in exponents for factor in factors)
    return [value for value in every if low <= value <= high]


def _time_ticks(end: float) -> list[float]:
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
    step = next((step for step in steps if end / step <= 6), 86400 * math.ceil(end / 86400 / 6))
    return [float(step * k) for k in range(int(end / step) + 1)] if end >= 1 else ticks(0, end, 4)


def _clock(value: float, end: float) -> str:
    if end < 120:
        return f"{value:g} s"
    if end < 7200:
        return f"{value / 60:g} min"
    return f"{value / 3600:g} h"


def _svg(frame: Frame, title: str, told: str, body: Markup) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(frame.width, frame.height, short(title, 200), short(told, 2000), body)


def _rect(name: str, x: float, y: float, width: float, height: float) -> Markup:
    return Markup('<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>').format(
        name, x, y, max(width, 0.0), max(height, 0.0)
    )


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        name, x1, y1, x2, y2
    )


def _text(name: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        name, x, y, anchor, escape(short(text, 60))
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _within(share: float) -> float:
    return min(max(share, 0.0), 1.0)
