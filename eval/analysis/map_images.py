"""The gallery's drawings: attention maps as inline PNG, charts as SVG.

Suffixes: Q steps, C columns.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from attention_predictor.eval.analysis.examples import BOTH, MISSED, NEEDLESS, NEITHER, Example
from attention_predictor.eval.analysis.patterns import CLASSES
from attention_predictor.eval.display.heatmap import MOST_LABELLED, Axes
from attention_predictor.eval.display.line_charts import ValueAxis, nice_ticks, tick_text
from attention_predictor.eval.display.svg import CHARACTER, svg
from attention_predictor.eval.display.svg_heatmap import axis_texts, ramp_colour, row_text

# What a block is to a step, in the colours that reports have for it; where there is more attention it is lighter.
_KINDS = {NEITHER: (150, 150, 160), BOTH: (42, 127, 176), MISSED: (212, 53, 127), NEEDLESS: (230, 159, 0)}
FLATTEST = 3  # an image's width to its height at most: a map of few steps is drawn taller
LETTERS = dict(zip(CLASSES, "ASPRU", strict=True))
STYLE = """
img.map { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 2px }
.maprow { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  margin: .5rem 0 1.75rem } .maprow svg { display: block; width: 100%; height: auto; max-width: 34rem }
.pairs { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.pairs svg { display: block; width: 100%; height: auto; max-width: 34rem }
.wrapped thead th, .wrapped th.policy { white-space: normal; min-width: 7rem }
svg .c0 { fill: var(--s0) } svg .c1 { fill: var(--s1) } svg .c2 { fill: var(--s2) } svg .c3 { fill: var(--s3) }
svg .c4 { fill: var(--s7) } svg text.in { fill: var(--ground); font-weight: 600 }
svg .dot { stroke: var(--ground); stroke-width: .8 }
.swatch { display: inline-block; width: 14px; height: 14px; border-radius: 2px; margin-right: .4rem;
  vertical-align: -2px } .key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: .5rem 0;
  list-style: none; font-size: .875rem }
"""


def attention_image(example: Example, which: str) -> str:
    """The map ``near`` or ``whole`` as an image, on the logarithmic scale of ``examples.grey``."""
    values_QC = getattr(example, which).pixels()
    palette = [ramp_colour(level / 255) for level in range(256)]
    return _image(values_QC, palette, f"attention, steps down, {_AXIS[which]} across")


def choice_image(example: Example) -> str:
    """What was chosen, and what was best, over the attention of the whole context."""
    light_QC = example.whole.pixels() // 4
    palette = []
    for kind in range(4):
        for level in range(64):
            share = (0.1 if kind == NEITHER else 0.5) + (0.9 if kind == NEITHER else 0.5) * level / 63
            palette.append(tuple(round(share * part) for part in _KINDS[kind]))
    index_QC = example.choice.pixels() * 64 + light_QC
    return _image(index_QC, palette, "blocks chosen and blocks that were the best, steps down, blocks across")


def kind_key() -> str:
    """Colour key of block choices."""
    names = {BOTH: "chosen, and of the best", MISSED: "of the best, not chosen", NEEDLESS: "chosen, not of the best"}
    items = (f"<li>{_swatch('rgb({},{},{})'.format(*_KINDS[kind]))}{name}</li>" for kind, name in names.items())
    return f'<ul class="key">{"".join(items)}</ul>'


def class_key() -> str:
    """Colour and letter of every pattern."""
    items = (
        f'<li><svg class="swatch" viewBox="0 0 14 14" aria-hidden="true"><rect class="c{number}" width="14" '
        f'height="14"/></svg><b>{LETTERS[name]}</b> {name}</li>'
        for number, name in enumerate(CLASSES)
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def class_map(patterns: Sequence[Sequence[str]], tips: Sequence[Sequence[str]], axes: Axes) -> str:
    """One cell for each head, coloured by pattern; letters if there are few cells."""
    labelled = len(axes.rows) * len(axes.columns) <= MOST_LABELLED
    wide, tall = (44, 28) if labelled else (16, 16)
    left, bottom = 26 + CHARACTER * max(map(len, axes.rows)), tall * len(axes.rows)
    parts = []
    for row, names in enumerate(patterns):
        y = row * tall
        parts.append(row_text(axes.rows[row], left, y + tall / 2))
        for column, name in enumerate(names):
            where = f'x="{left + column * wide}" y="{y}" width="{wide - 1}" height="{tall - 1}"'
            tip = f"<title>{escape(tips[row][column])}</title>"
            parts.append(f'<rect class="c{CLASSES.index(name)}" {where}>{tip}</rect>')
            if labelled:
                place = f'x="{left + (column + 0.5) * wide}" y="{y + tall / 2}" dy=".35em" text-anchor="middle"'
                parts.append(f'<text class="in" {place}>{LETTERS[name]}</text>')
    texts, width = axis_texts(axes, left, bottom, wide, every=1 if labelled else 2)
    parts += texts
    return svg(width + 4, bottom + 44, "patterns by layer and head", parts, fixed=True)


def scatter(
    points: Sequence[tuple[float, float, str, str]], *, x_title: str, y_title: str, width: int = 420, height: int = 300
) -> str:
    """A scatter plot; a point has x, y, pattern and tooltip."""
    x_ticks, y_ticks = (nice_ticks(min(x), max(x)) for x in zip(*((x, y) for x, y, _, _ in points), strict=True))
    axis = ValueAxis(y_ticks, width, height, left=62, bottom=46)

    def across(value: float) -> float:
        return axis.left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (width - axis.left - axis.right)

    parts = axis.frame({across(tick): tick_text(tick, x_ticks) for tick in x_ticks}, escape(x_title))
    for x, y, name, tip in points:
        place = f'cx="{across(x):.1f}" cy="{axis.up(y):.1f}" r="4.5"'
        parts.append(f'<circle class="dot c{CLASSES.index(name)}" {place}><title>{escape(tip)}</title></circle>')
    turned = f'transform="translate(14 {(height - axis.bottom + axis.top) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{escape(y_title)}</text>")
    return svg(width, height, f"{y_title} against {x_title}", parts)


def channel_bars(parts_of_score: Sequence[float], wavelengths: Sequence[float], name: str) -> str:
    """A bar for each pair of RoPE channels, the fastest first, and one for channels that don't turn, if any do not."""
    plain = [parts_of_score[-1]] if abs(parts_of_score[-1]) > 1e-9 else []
    order = sorted(range(len(wavelengths)), key=lambda pair: wavelengths[pair])
    bars = [parts_of_score[pair] for pair in order] + plain
    ends = (min(0.0, *bars), max(0.0, *bars))
    low, high = (end if abs(end) > 0.05 * max(map(abs, ends)) else 0.0 for end in ends)  # hardly beyond the axis: on it
    axis = ValueAxis(nice_ticks(low, high, about=4), height=190, left=50, right=10, top=10)
    step = (axis.width - axis.left - axis.right) / len(bars)
    shown = range(0, len(order), max(len(order) // 5, 1))
    labels = {axis.left + (place + 0.5) * step: _short(wavelengths[order[place]]) for place in shown}
    drawn = axis.frame(labels, "wavelength, tokens")
    for place, value in enumerate(bars):
        what = f"wavelength {_tokens(wavelengths[order[place]])}" if place < len(order) else "channels that don't turn"
        y, tall = min(axis.up(value), axis.up(0.0)), abs(axis.up(value) - axis.up(0.0))
        where = (
            f'x="{axis.left + place * step + 0.5:.1f}" y="{y:.1f}" width="{max(step - 1, 1):.1f}" height="{tall:.1f}"'
        )
        drawn.append(f'<rect class="c{CLASSES.index(name)}" {where}><title>{escape(what)}: {value:.3f}</title></rect>')
    return svg(axis.width, axis.height, f"parts of the score by wavelength, {name}", drawn)


def counts_bar(counts: Mapping[str, int]) -> str:
    """One bar: the number of maps of each pattern."""
    total, at, parts = max(sum(counts.values()), 1), 0.0, []
    for number, name in enumerate(CLASSES):
        wide = 420 * counts.get(name, 0) / total
        tip = f"<title>{name}: {counts.get(name, 0)}</title>"
        parts.append(f'<rect class="c{number}" x="{at:.1f}" y="0" width="{wide:.1f}" height="18">{tip}</rect>')
        at += wide
    return svg(420, 18, "maps by pattern", parts)


_AXIS = {"near": "tokens", "whole": "blocks"}


def _image(index_QC: np.ndarray, palette: Sequence[Sequence[int]], label: str) -> str:
    rows, columns = index_QC.shape
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, by palette
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(index_QC, np.uint8))
    colours = b"".join(bytes(colour) for colour in palette)
    chunks = ((b"IHDR", head), (b"PLTE", colours), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    data = base64.b64encode(png).decode()
    tall = max(rows, columns // FLATTEST)
    return (
        f'<img class="map" alt="{escape(label)}" width="{columns}" height="{tall}" src="data:image/png;base64,{data}">'
    )


def _swatch(colour: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true"><path fill="{colour}" d="M0 0h14v14H0z"/></svg>'


def _tokens(wavelength: float) -> str:
    return f"{wavelength:.1f} tokens" if wavelength < 100 else f"{wavelength:,.0f} tokens"


def _short(wavelength: float) -> str:
    if wavelength < 1000:
        return f"{wavelength:.0f}"
    return f"{wavelength / 1000:.0f}K" if wavelength < 1e6 else f"{wavelength / 1e6:.0f}M"
