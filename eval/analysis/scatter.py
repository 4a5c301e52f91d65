"""A plot of what TAPPA says: heads with similar queries are easier to foresee."""

from __future__ import annotations

from pathlib import Path

from attention_predictor.eval.analysis.gallery import correlation_text
from attention_predictor.eval.analysis.summary import Summary
from attention_predictor.eval.display.plots import COLOURS
from attention_predictor.figures import save_figure

PANELS = {"qsim_prompt_plain": "before RoPE", "qsim_prompt": "after RoPE"}
RECOVERY = "predictor_relative"


def plot_similarity(summary: Summary, path: Path) -> None:
    """Draw query similarity against recovery, a point a query head, a colour a third of the layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = sorted({head.layer for head in summary.heads})
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(9, 4.2), sharey=True, layout="constrained")
    for axes, (similarity, title) in zip(panels, PANELS.items(), strict=True):
        for third, name in enumerate(("lower", "middle", "upper")):
            within = layers[third * len(layers) // 3 : (third + 1) * len(layers) // 3]
            pairs = [(one.means[similarity], one.means[RECOVERY]) for one in summary.heads if one.layer in within]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            if points:
                axes.scatter(*zip(*points, strict=True), s=14, alpha=0.75, color=COLOURS[third], label=f"{name} layers")
        found = correlation_text(summary.correlations["head", similarity, RECOVERY])
        axes.set(title=f"{title}: ρ = {found}", xlabel=f"query similarity {title}")
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
    panels[0].set_ylabel("relative recovery, ahead only")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{Path(summary.settings['model']).name}: {len(summary.heads)} query heads")
    save_figure(figure, path)
    pyplot.close(figure)
