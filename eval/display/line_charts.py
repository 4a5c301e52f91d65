"""Line charts as inline SVG, over budgets and over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from attention_predictor.eval.display.svg import svg

COLOURS = 8  # line colours in the style sheet; further lines reuse them, dashed


@dataclass(frozen=True)
class Point:
    """A value and its interval."""

    value: float
    interval: tuple[float, float] | None = None


Lines = Mapping[str, Mapping[int, Point]]  # by name and budget
Curves = Mapping[str, Sequence[tuple[int, float]]]  # by name: steps and values
Bounds = tuple[float, float]  # lowest and highest possible value

ANYTHING = (-math.inf, math.inf)


def line_chart(title: str, lines: Lines, level: float | None = None, bounds: Bounds = ANYTHING) -> str:
    """A line for each name, with whiskers, over budgets that are evenly spaced whatever their size.

    Args:
        level: Drawn across, dashed.
    """
    budgets = sorted({budget for points in lines.values() for budget in points})
    everything = [point for points in lines.values() for point in points.values()]
    ends = [end for point in everything for end in (point.value, *(point.interval or ()))]
    ends += [] if level is None else [level]
    axis = ValueAxis(nice_ticks(min(ends), max(ends), bounds))
    step = (axis.width - axis.left - axis.right) / len(budgets)
    places = {budget: axis.left + (number + 0.5) * step for number, budget in enumerate(budgets)}
    parts = axis.frame({x: str(budget) for budget, x in places.items()}, "budget, tokens")
    if level is not None:
        parts.append(axis.across(axis.up(level), "level"))
    for number, (name, points) in enumerate(lines.items()):
        # Shift lines horizontally so that whiskers of equal values don't overlap.
        shift = (number - (len(lines) - 1) / 2) * min(14.0, 0.6 * step / len(lines))
        if points:  # a line without points keeps its colour
            placed = {places[one] + shift: (one, points[one]) for one in sorted(points)}
            parts.append(_line(number, name, placed, axis))
    return svg(axis.width, axis.height, f"{title}, against budget", parts)


def curve_chart(title: str, curves: Curves, bounds: Bounds = ANYTHING) -> str:
    """A curve for each name, over steps."""
    values = [value for points in curves.values() for _, value in points]
    axis = ValueAxis(nice_ticks(min(values), max(values), bounds))
    last = max(step for points in curves.values() for step, _ in points)
    room = (axis.width - axis.left - axis.right) / last
    labels = {axis.left + room * tick: f"{tick:g}" for tick in nice_ticks(0, last) if tick <= last}
    parts = axis.frame(labels, "decoding step")
    for number, (name, points) in enumerate(curves.items()):
        path = "L".join(f"{axis.left + room * step:.1f} {axis.up(value):.1f}" for step, value in points)
        if path:  # a curve without points keeps its colour
            tip = f"<title>{escape(name)}</title>"
            # A single point is drawn as a line of length zero with round ends.
            line = f"M{path}{'h0' if len(points) == 1 else ''}"
            parts.append(f'<g class="{_classes(number)} curve"><path d="{line}"/>{tip}</g>')
    return svg(axis.width, axis.height, f"{title}, over steps", parts)


@dataclass(frozen=True)
class ValueAxis:
    """The value axis of a chart: positions, grid lines and labels. Sizes are those of the SVG."""

    ticks: Sequence[float]
    width: int = 420
    height: int = 260
    left: int = 54
    right: int = 14
    top: int = 12
    bottom: int = 44

    def up(self, value: float) -> float:
        """The y of a value."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.height - self.bottom - share * (self.height - self.bottom - self.top)

    def across(self, y: float, kind: str) -> str:
        """A horizontal line of a class."""
        return f'<line class="{kind}" x1="{self.left}" x2="{self.width - self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'

    def frame(self, labels: Mapping[float, str], title: str) -> list[str]:
        """Grid and tick labels of this axis; labels (by x) and title of the other axis."""
        parts = []
        for tick in self.ticks:
            y = self.up(tick)
            parts.append(self.across(y, "zero" if tick == 0 else "grid"))
            place = f'x="{self.left - 6}" y="{y:.1f}" dy=".35em" text-anchor="end"'
            parts.append(f"<text {place}>{tick_text(tick, self.ticks)}</text>")
        for x, label in labels.items():
            place = f'x="{x:.1f}" y="{self.height - self.bottom + 17}"'
            parts.append(f'<text {place} text-anchor="middle">{label}</text>')
        middle = (self.left + self.width - self.right) / 2
        parts.append(f'<text x="{middle}" y="{self.height - 7}" text-anchor="middle">{title}</text>')
        return parts


def legend_mark(number: int | None) -> str:
    """The legend's mark of a line by number; ``None`` for the level."""
    if number is None:
        return svg(30, 14, "", ['<line class="level" x1="1" x2="29" y1="7" y2="7"/>'])
    return svg(30, 14, "", [f'<g class="{_classes(number)}"><path d="M1 7H29"/>{_marker(number, 15, 7)}</g>'])


def nice_ticks(low: float, high: float, bounds: Bounds = ANYTHING, about: int = 5) -> list[float]:
    """Round numbers in even steps, from one at or below ``low`` to one at or above ``high``.

    Args:
        bounds: Not to be gone beyond where ``low`` and ``high`` are equal and something is put around them.
    """
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low = max(low - 0.5 * (abs(low) or 1.0), min(bounds[0], low))
        high = min(high + 0.5 * (abs(high) or 1.0), max(bounds[1], high))
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _line(number: int, name: str, points: Mapping[float, tuple[int, Point]], axis: ValueAxis) -> str:
    path = "M" + "L".join(f"{x:.1f} {axis.up(point.value):.1f}" for x, (_, point) in points.items())
    parts = [f'<path d="{path}"/>']
    for x, (budget, point) in points.items():
        tip = f"{name} at {budget}: {point.value:.2f}"
        if point.interval is not None:
            low, high = point.interval
            parts.append(f'<path class="whisker" d="M{x:.1f} {axis.up(low):.1f}V{axis.up(high):.1f}"/>')
            tip += f" [{low:.2f}, {high:.2f}]"
        parts.append(f"<g>{_marker(number, x, axis.up(point.value))}<title>{escape(tip)}</title></g>")
    return f'<g class="{_classes(number)}">{"".join(parts)}</g>'


def _classes(number: int) -> str:
    return f"s{number % COLOURS}" + (" again" if number >= COLOURS else "")


def _marker(number: int, x: float, y: float) -> str:
    """Marker shapes, which tell lines apart without colours."""
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x:.1f} {y - 4.6:.1f}l4.6 8h-9.2z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    )
    return f'<path class="marker" d="{shapes[number % len(shapes)]}"/>'


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as their distance has."""
    step = ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if step * 10**decimals % 1 > 1e-6:  # steps of 2.5
        decimals += 1
    return f"{tick:.{decimals}f}".replace("-", "−")
