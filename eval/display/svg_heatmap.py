"""Heat maps as inline SVG."""

from __future__ import annotations

import math
from html import escape

from attention_predictor.eval.display.heatmap import MOST_LABELLED, Axes, Panel
from attention_predictor.eval.display.svg import CHARACTER, svg

# Dark blue to yellow, light growing evenly, also for colour-blind readers (after cividis, Nuñez et al. 2018).
RAMP = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))


def heat_map(panel: Panel, axes: Axes, low: float, high: float) -> str:
    """Cells from ``low`` (dark) to ``high`` (light), with numbers if there are few cells."""
    labelled = len(axes.rows) * len(axes.columns) <= MOST_LABELLED
    wide, tall = (max(44, CHARACTER * max(map(len, axes.columns)) + 8), 28) if labelled else (16, 16)
    left = 26 + CHARACTER * max(map(len, axes.rows))
    bottom = tall * len(axes.rows)
    parts = []
    for row, (name, values) in enumerate(zip(axes.rows, panel.cells, strict=True)):
        y = row * tall
        parts.append(row_text(name, left, y + tall / 2))
        for column, value in enumerate(values):
            place = f'x="{left + column * wide}" y="{y}" width="{wide - 1}" height="{tall - 1}"'
            where = f"{axes.row_title} {name}, {axes.column_title} {axes.columns[column]}"
            if value is None:
                parts.append(f'<rect class="none" {place}><title>{escape(where)}: none</title></rect>')
                continue
            share = (value - low) / (high - low) if high > low else 1.0
            red, green, blue = ramp_colour(share)
            tip = f"<title>{escape(where)}: {value:.3f}</title>"
            parts.append(f'<rect fill="rgb({red},{green},{blue})" {place}>{tip}</rect>')
            if labelled:
                ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else "#000"
                place = f'x="{left + (column + 0.5) * wide}" y="{y + tall / 2}" dy=".35em"'
                parts.append(f'<text {place} text-anchor="middle" style="fill:{ink}">{value:.2f}</text>')
    texts, width = axis_texts(axes, left, bottom, wide, every=1 if labelled else math.ceil(30 / wide))
    parts += texts
    height = bottom + 44
    # With few rows, a long row title needs more height.
    above = max(0.0, (CHARACTER * len(axes.row_title) - bottom) / 2)
    label = f"{panel.title}: {axes.row_title} down, {axes.column_title} across"
    return svg(width + 4, height + above, label, parts, top=-above, fixed=True)


def row_text(name: str, left: float, y: float) -> str:
    """The name of a row of cells that begins at ``left``, whose middle is at ``y``."""
    return f'<text x="{left - 6}" y="{y}" dy=".35em" text-anchor="end">{escape(name)}</text>'


def axis_texts(axes: Axes, left: float, bottom: float, wide: float, *, every: int) -> tuple[list[str], float]:
    """Labels of every ``every``-th column, titles of both axes, and the total width.

    Args:
        left, bottom: Where the cells begin, and end.
        wide: Width of a cell.
    """
    parts = []
    for column in range(0, len(axes.columns), every):
        place = f'x="{left + (column + 0.5) * wide}" y="{bottom + 16}"'
        parts.append(f'<text {place} text-anchor="middle">{escape(axes.columns[column])}</text>')
    width = left + max(wide * len(axes.columns), CHARACTER * len(axes.column_title))
    middle = (left + width) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(axes.column_title)}</text>')
    turned = f'transform="translate(12 {bottom / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(axes.row_title)}</text>')
    return parts, width


def colour_bar(low: str, high: str) -> str:
    """Colour bar of heat maps, with the values at its ends as text."""
    parts = []
    for step in range(40):
        red, green, blue = ramp_colour((step + 0.5) / 40)
        parts.append(f'<rect x="{64 + step * 4}" y="2" width="4.5" height="12" fill="rgb({red},{green},{blue})"/>')
    parts.append(f'<text x="58" y="8" dy=".35em" text-anchor="end">{low}</text>')
    parts.append(f'<text x="231" y="8" dy=".35em">{high}</text>')
    return svg(270, 16, f"colours from {low} to {high}", parts, fixed=True)


def ramp_colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue of a share from 0 to 1."""
    place = min(1.0, max(0.0, share)) * (len(RAMP) - 1)
    first = min(int(place), len(RAMP) - 2)
    pairs = zip(RAMP[first], RAMP[first + 1], strict=True)
    red, green, blue = (round(start + (end - start) * (place - first)) for start, end in pairs)
    return red, green, blue
