"""Reports of a training run: learning curves and a model card."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from attention_predictor.errors import DataError
from attention_predictor.figures import save_figure
from attention_predictor.train.options import TrainOptions

CURVES_FILE = "curves.png"
CARD_FILE = "README.md"


def draw_curves(path: Path, curve: list[dict[str, Any]], rules: dict[str, float], arch: str) -> None:
    """Plot loss and relative recovery ahead on held-out documents, with the rules' recovery, over steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("learning curves need matplotlib: pip install 'attention-predictor[train]'") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [point["step"] for point in curve]
    left.plot(steps, [point["loss"] for point in curve], color="tab:blue")
    left.set(xlabel="step", ylabel="loss, mean since the last point", title="training")
    right.plot(steps, [point["recovered"] for point in curve], color="tab:blue", label=arch)
    for (name, value), colour in zip(rules.items(), ("tab:orange", "tab:green", "tab:gray"), strict=False):
        right.axhline(value, color=colour, linestyle="--", label=name)
    right.set(xlabel="step", ylabel="relative recovery ahead, mean over budgets", title="held-out documents")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def summary(metrics: dict[str, Any], options: TrainOptions, out: str) -> str:
    """A small table that compares the predictor with rules on held-out documents."""
    found = metrics["validation"]
    budgets = list(found[options.arch]["relative_recovery"])
    width = max(map(len, ("budget", *found)))
    lines = [
        "recovery relative to the best selection, %, one step ahead, on held-out documents:",
        f"{'budget':{width}}" + "".join(f"{budget:>8}" for budget in budgets),
    ]
    for name, of in found.items():
        percents = (100 * of["relative_recovery"][budget] for budget in budgets)
        lines.append(f"{name:{width}}" + "".join(f"{percent:8.2f}" for percent in percents))
    done = f"{metrics['steps']} of {options.steps} steps"
    again = "; --resume goes on" if metrics["interrupted"] else ""
    return "\n".join([*lines, f"after {done}{again}; saved to {out}"])


def card(facts: dict[str, Any], options: TrainOptions, data: list[str], out: str) -> str:
    """A model card in Markdown: training data, command, and comparison with rules."""
    arch, default = options.arch, TrainOptions()
    changed = [one.name for one in fields(options) if getattr(options, one.name) != getattr(default, one.name)]
    command = ["attnpred", "train"]
    for directory in data:
        command += ["--data", directory]
    command += ["--out", out]
    for name in changed:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    found = facts["metrics"]["validation"]
    budgets = list(found[arch]["relative_recovery"])
    lines = [
        f"# {arch}, a predictor of attention",
        "",
        f"Trained on {facts['documents']} documents recorded from `{facts['recorded_from']}` ({facts['rows']} rows), "
        f"judged on {facts['held_out_documents']} held out; "
        f"{facts['metrics']['steps']} of {facts['options']['steps']} steps"
        + (", interrupted." if facts["metrics"]["interrupted"] else "."),
        "",
        f"    {shlex.join(command)}",
        "",
        "Recovery relative to the best selection, one step ahead, on the held-out documents, by budget:",
        "",
        "| predictor | " + " | ".join(budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name, metrics in found.items():
        values = " | ".join(f"{metrics['relative_recovery'][budget]:.4f}" for budget in budgets)
        lines.append(f"| {name} | {values} |")
    lines += ["", f"![learning curves]({CURVES_FILE})", ""]
    return "\n".join(lines)
