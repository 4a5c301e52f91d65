"""Plots of timings: milliseconds a token against context, tokens a second against batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attention_predictor.arguments import check_output
from attention_predictor.errors import ConfigError
from attention_predictor.figures import save_figure

FORMATS = (".png", ".svg", ".pdf")
# Distinct in print and for colour-blind readers (Okabe and Ito 2008); ours are the strong ones.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_plot(path: Path | None) -> None:
    """Raise ``ConfigError`` for a plot that can't be drawn; ``None`` asks for none."""
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot {path}: expected a name that ends in one of {', '.join(FORMATS)}")
    check_output("--plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'attention-predictor[train]'")


def plot_timings(rows: Sequence[Mapping[str, Any]], path: Path, title: str, *, floor: str) -> None:
    """Draw the rows that have ``median_ms``; the setup named ``floor`` as a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    timed = [row for row in rows if "median_ms" in row]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = [name for name in dict.fromkeys(row["name"] for row in timed) if name != floor]
    for number, name in enumerate(names):
        points = sorted((row["context"], row["median_ms"]) for row in timed if row["name"] == name)
        width, marker = (2.2, "o") if name.startswith("ours") else (1.6, "s")
        label = f"{name}: {points[-1][1]:,.1f} ms at {_tokens(points[-1][0])}"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=width, marker=marker)
    for level_ms in (row["median_ms"] for row in timed if row["name"] == floor):
        label = f"{floor}: {level_ms:,.1f} ms"
        axes.axhline(level_ms, color="0.45", linestyle="--", linewidth=1.4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms a token", title=title)
    contexts = sorted({row["context"] for row in timed if row["name"] != floor})
    axes.set_xticks(contexts, [_tokens(context) for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="0.88")
    axes.legend(fontsize="small")
    save_figure(figure, path)
    pyplot.close(figure)


def plot_throughput(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the rows that have ``tokens_per_second``: a line for each setup and context, over the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    timed = [row for row in rows if "tokens_per_second" in row]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names, contexts = (list(dict.fromkeys(row[key] for row in timed)) for key in ("name", "context"))
    for name, context in dict.fromkeys((row["name"], row["context"]) for row in timed):
        here = [row for row in timed if row["name"] == name and row["context"] == context]
        points = sorted((row["batch"], row["tokens_per_second"]) for row in here)
        style: dict[str, Any] = {
            "color": COLOURS[contexts.index(context) % len(COLOURS)],
            "marker": "os^Dv"[names.index(name) % 5],
        }
        style["linestyle"] = "-" if name.startswith("ours") else "--"
        best = max(rate for _, rate in points)
        axes.plot(*zip(*points, strict=True), label=f"{name}, {_tokens(context)}: up to {best:,.0f}", **style)
    axes.set(xscale="log", xlabel="sequences", ylabel="tokens a second", title=title)
    batches = sorted({row["batch"] for row in timed})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.grid(True, which="major", color="0.88")
    if timed:
        axes.legend(fontsize="small")
    save_figure(figure, path)
    pyplot.close(figure)


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
