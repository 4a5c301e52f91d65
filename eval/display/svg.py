"""Inline SVG; colours of text, axes and lines are the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CHARACTER = 7  # width of one at the page's size of letters in charts, roughly


def svg(width: float, height: float, label: str, parts: Sequence[str], *, top: float = 0.0, fixed: bool = False) -> str:
    """An SVG element of parts; ``fixed`` keeps its size. Without a label, screen readers skip it."""
    size = f' width="{width:g}" height="{height:g}"' if fixed else ""
    what = f' role="img" aria-label="{escape(label)}"' if label else ' aria-hidden="true"'
    return f'<svg viewBox="0 {top:g} {width:g} {height:g}"{size}{what}>{"".join(parts)}</svg>'
