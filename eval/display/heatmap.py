"""Heat maps as a picture: one panel for each variant, all on one scale."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_predictor.errors import ConfigError
from attention_predictor.figures import save_figure

FILE = "heatmap.png"
MOST_LABELLED = 240  # cells of a panel; a panel with more shows no numbers


@dataclass(frozen=True)
class Panel:
    """One heat map; ``None`` is a cell without a value."""

    title: str
    cells: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Axes:
    """Names of rows and columns, shared by all panels, and titles of both axes."""

    rows: Sequence[str]
    columns: Sequence[str]
    row_title: str
    column_title: str


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of one run, all on one scale from ``low`` to ``high``."""

    title: str
    panels: Sequence[Panel]
    axes: Axes
    low: float = 0.0
    high: float = 1.0


def check_heatmap(wanted: bool) -> None:
    """Raise ``ConfigError`` if a heat map is wanted and matplotlib is missing."""
    if wanted and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the heat map needs matplotlib: pip install 'attention-predictor[train]', or --no-plot")


def draw_heatmaps(maps: HeatMaps, path: Path) -> None:
    """Draw panels side by side as a picture; low values are dark, high ones light."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, axes, low, high = maps.panels, maps.axes, maps.low, maps.high
    across = math.ceil(math.sqrt(len(panels)))
    down = math.ceil(len(panels) / across)
    width, height = max(2.6, 0.52 * len(axes.columns) + 1), max(2.2, 0.34 * len(axes.rows) + 1)
    figure, places = pyplot.subplots(
        down, across, figsize=(across * width + 1, down * height + 0.6), squeeze=False, layout="constrained"
    )
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="0.85")
    for place, panel in zip(places.flat, panels, strict=False):
        cells = [[math.nan if value is None else value for value in row] for row in panel.cells]
        place.imshow(cells, vmin=low, vmax=high, cmap=colours, aspect="auto")
        place.set_title(panel.title, fontsize="medium")
        place.set_xticks(range(len(axes.columns)), axes.columns, rotation=90 if len(axes.columns) > 8 else 0)
        place.set_yticks(range(len(axes.rows)), axes.rows)
        place.tick_params(labelsize="x-small")
        place.set_xlabel(axes.column_title, fontsize="small")
        place.set_ylabel(axes.row_title, fontsize="small")
        if len(axes.rows) * len(axes.columns) <= MOST_LABELLED:
            _write_values(place, cells, (low + high) / 2)
    for place in places.flat[len(panels) :]:
        place.axis("off")
    figure.suptitle(maps.title)
    figure.colorbar(places.flat[0].images[0], ax=places, shrink=0.8)
    save_figure(figure, path)
    pyplot.close(figure)


def _write_values(place: Any, cells: Sequence[Sequence[float]], middle: float) -> None:
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            if not math.isnan(value):
                colour = "white" if value < middle else "black"
                place.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="xx-small")
