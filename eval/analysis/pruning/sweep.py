"""Perplexity of a model without 1, 2, … of its layers, by different orders of removing them.

Suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from attention_predictor.eval.analysis.pruning.plan import METRICS, Scores, importance, order
from attention_predictor.eval.analysis.pruning.shorten import without_layers
from attention_predictor.eval.display.plots import COLOURS
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.figures import save_figure

RANDOM = "random"
CHUNK = 1024  # tokens whose probabilities are held in fp32 at once

Orders = Mapping[str, Sequence[Sequence[int]]]


def make_orders(scores: Scores, beta: float, seeds: int, depth: int) -> dict[str, list[list[int]]]:
    """Orders of removal by name: one for each metric, and one random order for each seed from 0 on."""
    found = {metric: [order(importance(scores, metric, beta))] for metric in METRICS}
    return found | {RANDOM: [random.Random(seed).sample(range(depth), depth) for seed in range(seeds)]}


@torch.no_grad()
def bits_per_token(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Bits a token over all tokens except each text's first, with full attention."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids_1T = torch.tensor([list(text)], device=model.device)
        logits_TV, target_T = model(ids_1T, use_cache=False).logits[0, :-1], ids_1T[0, 1:]
        for logits_tV, target_t in zip(logits_TV.split(CHUNK), target_T.split(CHUNK), strict=True):
            nats += float(F.cross_entropy(logits_tV.float(), target_t, reduction="sum"))
        tokens += len(target_T)
    return nats / tokens / math.log(2)


@dataclass(frozen=True)
class Sweep:
    """Bits a token by order's name: of each order, with 0, 1, 2, … layers removed."""

    bits: Mapping[str, Sequence[Sequence[float]]]

    @classmethod
    def run(
        cls,
        model: PreTrainedModel,
        texts: Sequence[Sequence[int]],
        orders: Orders,
        count: int,
        after_each: Callable[[], object] = lambda: None,
    ) -> Sweep:
        """Evaluate the model without the first 0 to ``count`` layers of every order.

        Args:
            after_each: Called after each of them, known already or not.
        """
        known: dict[frozenset[int], float] = {}
        bits: dict[str, list[list[float]]] = {}
        for name, several in orders.items():
            bits[name] = []
            for one in several:
                bits[name].append([])
                for removed in (frozenset(one[:gone]) for gone in range(count + 1)):
                    if removed not in known:
                        with without_layers(model, removed):
                            known[removed] = bits_per_token(model, texts)
                    bits[name][-1].append(known[removed])
                    after_each()
        return cls(bits)

    def table(self) -> str:
        """Perplexities: layers removed down, orders across; of random ones the mean of bits, and their range."""
        rows: list[tuple[object, ...]] = []
        for gone in range(len(next(iter(self.bits.values()))[0])):
            by_name = {name: [one[gone] for one in several] for name, several in self.bits.items()}
            shown = [f"{2 ** fmean(found):,.2f}" for found in by_name.values()]
            rows.append((str(gone), *shown, f"{2 ** min(by_name[RANDOM]):,.2f}–{2 ** max(by_name[RANDOM]):,.2f}"))
        seeds = len(self.bits[RANDOM])
        notes = [f"{RANDOM}: 2 to the power of the mean bits a token of {seeds} orders, and their range"]
        return text_table(("layers removed", *self.bits, "range"), rows, notes)

    def plot(self, path: Path, title: str) -> None:
        """A line for each metric, random orders as a band."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for colour, (name, several) in zip(COLOURS, self.bits.items(), strict=False):
            perplexities = [[2**bits for bits in one] for one in several]
            middle = [2 ** fmean(bits) for bits in zip(*several, strict=True)]
            gone = range(len(middle))
            axes.plot(gone, middle, color=colour, label=name, marker="o", linestyle="--" if name == RANDOM else "-")
            if name == RANDOM:
                lowest, highest = ([end(column) for column in zip(*perplexities, strict=True)] for end in (min, max))
                axes.fill_between(gone, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        axes.set(yscale="log", xlabel="layers removed", ylabel="perplexity", title=title)
        axes.set_xticks(gone)
        axes.grid(True, which="both", color="0.9")
        axes.legend()
        save_figure(figure, path)
        pyplot.close(figure)

    def to_dict(self) -> dict[str, Any]:
        return {"bits_per_token": {name: [list(one) for one in several] for name, several in self.bits.items()}}
