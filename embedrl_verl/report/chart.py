# SPDX-License-Identifier: Apache-2.0
"""A line chart over steps, as numbers that a template writes as SVG.

matplotlib's SVG styles its elements in place, which the page's content security policy forbids.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
"""Of the frame, in pixels of the chart."""
MAX_POINTS = 400
"""Of a line; more are averaged in turn."""
MARKED = 20
"""Up to so many points a line has a mark at each; above, it is a mean of neighbours over the faint points."""
Points = Sequence[tuple[float, float]]
Ticks = tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Line:
    """A drawn line: its name, colour and last value, "x,y x,y" of what is drawn strong and faint, and its marks."""

    name: str
    colour: int
    last: str
    strong: str
    faint: str
    marks: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A drawn chart; ticks are (pixel, label)."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: Ticks
    y_ticks: Ticks


def draw(
    title: str, lines: Mapping[str, Mapping[int, float]], bounds: tuple[float, float] | None = None
) -> Chart | None:
    """Lines by name, each a value by step; None if no line has a point.

    Args:
        bounds: lowest and highest value of the axis; None: by the values.
    """
    known = {name: _thinned(sorted(points.items())) for name, points in lines.items() if points}
    if not known:
        return None
    steps, values = zip(*(point for points in known.values() for point in points), strict=True)
    y_step, (low, high) = _axis(*(bounds or (min(values), max(values))))
    x_step, _ = _axis(min(steps), max(steps))
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (step - first) / (last - first), (value - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for number, (name, points) in enumerate(known.items()):
        placed = [place(*point) for point in points]
        few = len(points) <= MARKED
        strong = placed if few else [place(*point) for point in _smoothed(points)]
        faint, marks = ("", tuple(placed)) if few else (_path(placed), ())
        drawn.append(Line(name, number, f"{lines[name][max(lines[name])]:.3g}", _path(strong), faint, marks))
    whole = max(1, round(x_step))
    shown = range(-(-int(first) // whole) * whole, int(last) + 1, whole)
    x_ticks = [(place(step, low)[0], str(step)) for step in shown]
    y_ticks = [(place(first, low + n * y_step)[1], low + n * y_step) for n in range(round((high - low) / y_step) + 1)]
    return Chart(title, tuple(drawn), tuple(x_ticks), tuple((at, f"{value:.6g}") for at, value in y_ticks))


def _axis(low: float, high: float) -> tuple[float, tuple[float, float]]:
    """Distance of round ticks, about five, and ends on ticks."""
    if high == low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(one * power for one in (1, 2, 5, 10) if one * power * 5 >= (high - low) * 0.999)
    # Rounded: 0.3 / 0.1 is a little below 3.
    return step, (math.floor(round(low / step, 6)) * step, math.ceil(round(high / step, 6)) * step)


def _thinned(points: Points) -> Points:
    size = -(-len(points) // MAX_POINTS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in chunk), statistics.fmean(y for _, y in chunk)) for chunk in chunks]


def _smoothed(points: Points) -> Points:
    """Mean of a tenth of the points around each."""
    half = len(points) // 20
    around = [points[max(0, at - half) : at + half + 1] for at in range(len(points))]
    return [(x, statistics.fmean(y for _, y in near)) for (x, _), near in zip(points, around, strict=True)]


def _path(placed: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
