"""A table for a terminal: names to the left, figures to the right, notes below."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MISSING = "–"


def text_table(titles: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> str:
    """Columns as wide as they need to be; floats have two decimals, ``None`` is a dash."""
    cells = [list(titles), *([_shown(value) for value in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = ((cell, width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        padded = [first[0] + " " * first[1], *(" " * space + cell for cell, space in others)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *notes])


def _shown(value: object) -> str:
    return MISSING if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
