"""Charts as inline SVG: lines over budgets, and heat maps; colours of text, axes and lines are the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from attention_predictor.eval.heatmap import MOST_LABELLED, Axes, Panel

COLOURS = 8  # of lines, in the page's style; further lines use them again, dashed

# Dark blue to yellow, light growing evenly, also for colour-blind readers (after cividis, Nuñez et al. 2018).
_RAMP = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 260, 54, 14, 12, 44
_CHARACTER = 7  # width of one at the page's size of letters in charts, roughly


@dataclass(frozen=True)
class Point:
    """A value, and between what it may lie."""

    value: float
    interval: tuple[float, float] | None = None


Lines = Mapping[str, Mapping[int, Point]]  # by name and budget


def line_chart(title: str, lines: Lines, level: float | None = None) -> str:
    """A line for each name, with whiskers, over budgets that are evenly spaced whatever their size.

    Args:
        level: Drawn across, dashed.
    """
    budgets = sorted({budget for points in lines.values() for budget in points})
    everything = [point for points in lines.values() for point in points.values()]
    ends = [end for point in everything for end in (point.value, *(point.interval or ()))]
    ends += [] if level is None else [level]
    ticks = nice_ticks(min(ends), max(ends))
    step = (_WIDTH - _LEFT - _RIGHT) / len(budgets)

    def across(budget: int, shift: float = 0.0) -> float:
        return _LEFT + (budgets.index(budget) + 0.5) * step + shift

    def up(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    parts = []
    for tick in ticks:
        y = f"{up(tick):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{_number(tick, ticks)}</text>')
    for budget in budgets:
        place = f'x="{across(budget):.1f}" y="{_HEIGHT - _BOTTOM + 17}"'
        parts.append(f'<text {place} text-anchor="middle">{budget}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 7}" text-anchor="middle">budget, tokens</text>')
    if level is not None:
        y = f"{up(level):.1f}"
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
    for number, (name, points) in enumerate(lines.items()):
        # A little apart, so that whiskers of equal values don't hide each other.
        shift = (number - (len(lines) - 1) / 2) * min(14.0, 0.6 * step / len(lines))
        if points:  # a line without any keeps its colour
            parts.append(_line(number, name, {across(one, shift): (one, points[one]) for one in sorted(points)}, up))
    return _svg(_WIDTH, _HEIGHT, f"{title}, against budget", parts)


def legend_mark(number: int | None) -> str:
    """The line of that number, or ``None`` the level's, as the legend shows it."""
    if number is None:
        return _svg(30, 14, "", ['<line class="level" x1="1" x2="29" y1="7" y2="7"/>'])
    return _svg(30, 14, "", [f'<g class="{_classes(number)}"><path d="M1 7H29"/>{_marker(number, 15, 7)}</g>'])


def heat_map(panel: Panel, axes: Axes, low: float, high: float) -> str:
    """Cells from ``low`` (dark) to ``high`` (light), with their values where these are few enough to be read."""
    labelled = len(axes.rows) * len(axes.columns) <= MOST_LABELLED
    wide, tall = (max(44, _CHARACTER * max(map(len, axes.columns)) + 8), 28) if labelled else (16, 16)
    left = 26 + _CHARACTER * max(map(len, axes.rows))
    bottom = tall * len(axes.rows)
    parts = []
    for row, (name, values) in enumerate(zip(axes.rows, panel.cells, strict=True)):
        y = row * tall
        parts.append(f'<text x="{left - 6}" y="{y + tall / 2}" dy=".35em" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(values):
            place = f'x="{left + column * wide}" y="{y}" width="{wide - 1}" height="{tall - 1}"'
            where = f"{axes.row_title} {name}, {axes.column_title} {axes.columns[column]}"
            if value is None:
                parts.append(f'<rect class="none" {place}><title>{escape(where)}: none</title></rect>')
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            red, green, blue = _colour(share)
            tip = f"<title>{escape(where)}: {value:.3f}</title>"
            parts.append(f'<rect fill="rgb({red},{green},{blue})" {place}>{tip}</rect>')
            if labelled:
                ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else "#000"
                place = f'x="{left + (column + 0.5) * wide}" y="{y + tall / 2}" dy=".35em"'
                parts.append(f'<text {place} text-anchor="middle" style="fill:{ink}">{value:.2f}</text>')
    every = 1 if labelled else math.ceil(30 / wide)
    for column in range(0, len(axes.columns), every):
        place = f'x="{left + (column + 0.5) * wide}" y="{bottom + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{escape(axes.columns[column])}</text>')
    width = left + max(wide * len(axes.columns), _CHARACTER * len(axes.column_title))
    middle = (left + width) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(axes.column_title)}</text>')
    turned = f'transform="translate(12 {bottom / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(axes.row_title)}</text>')
    height = bottom + 44
    # A long title of the rows sticks out where there are few of them.
    above = max(0.0, (_CHARACTER * len(axes.row_title) - bottom) / 2)
    label = f"{panel.title}: {axes.row_title} down, {axes.column_title} across"
    return _svg(width + 4, height + above, label, parts, top=-above, fixed=True)


def colour_bar(low: float, high: float) -> str:
    """What the colours of heat maps mean."""
    parts = []
    for step in range(40):
        red, green, blue = _colour((step + 0.5) / 40)
        parts.append(f'<rect x="{44 + step * 4}" y="2" width="4.5" height="12" fill="rgb({red},{green},{blue})"/>')
    parts.append(f'<text x="38" y="8" dy=".35em" text-anchor="end">{low:.2f}</text>')
    parts.append(f'<text x="211" y="8" dy=".35em">{high:.2f}</text>')
    return _svg(250, 16, f"colours from {low:.2f} to {high:.2f}", parts, fixed=True)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in even steps, from one at or below ``low`` to one at or above ``high``."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _line(number: int, name: str, points: Mapping[float, tuple[int, Point]], up: Callable[[float], float]) -> str:
    path = "M" + "L".join(f"{x:.1f} {up(point.value):.1f}" for x, (_, point) in points.items())
    parts = [f'<path d="{path}"/>']
    for x, (budget, point) in points.items():
        tip = f"{name} at {budget}: {point.value:.2f}"
        if point.interval is not None:
            low, high = point.interval
            parts.append(f'<path class="whisker" d="M{x:.1f} {up(low):.1f}V{up(high):.1f}"/>')
            tip += f" [{low:.2f}, {high:.2f}]"
        parts.append(f"<g>{_marker(number, x, up(point.value))}<title>{escape(tip)}</title></g>")
    return f'<g class="{_classes(number)}">{"".join(parts)}</g>'


def _classes(number: int) -> str:
    return f"s{number % COLOURS}" + (" again" if number >= COLOURS else "")


def _marker(number: int, x: float, y: float) -> str:
    """Told apart without colours too."""
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x:.1f} {y - 4.6:.1f}l4.6 8h-9.2z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    )
    return f'<path class="marker" d="{shapes[number % len(shapes)]}"/>'


def _colour(share: float) -> tuple[int, int, int]:
    place = min(1.0, max(0.0, share)) * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    pairs = zip(_RAMP[first], _RAMP[first + 1], strict=True)
    red, green, blue = (round(start + (end - start) * (place - first)) for start, end in pairs)
    return red, green, blue


def _number(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if step * 10**decimals % 1 > 1e-6:  # steps of 2.5
        decimals += 1
    return f"{tick:.{decimals}f}".replace("-", "−")


def _svg(
    width: float, height: float, label: str, parts: Sequence[str], *, top: float = 0.0, fixed: bool = False
) -> str:
    size = f' width="{width:g}" height="{height:g}"' if fixed else ""
    what = f' role="img" aria-label="{escape(label)}"' if label else ' aria-hidden="true"'
    return f'<svg viewBox="0 {top:g} {width:g} {height:g}"{size}{what}>{"".join(parts)}</svg>'
