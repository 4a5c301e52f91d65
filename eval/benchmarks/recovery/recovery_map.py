"""``attnpred eval recovery-map``: attention mass recovered by layer and head while documents are decoded."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.recovery.block_map import map_record
from attention_predictor.eval.benchmarks.recovery.head_recovery import check_measurable, measure_heads
from attention_predictor.eval.display.heatmap import Axes, HeatMaps, Panel
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, Sample, run
from attention_predictor.eval.harness.scores import mean_scores, notes, show_results
from attention_predictor.eval.harness.teacher_forcing import decode_tails, prefill
from attention_predictor.eval.harness.windows import WindowBenchmark, Windows, windows_of

SEQUENCES = 8  # tails decoded at once: each has a cache of its own


class RecoveryMap(WindowBenchmark):
    """Document tails; recovery is measured by layer and head while they are decoded.

    Args:
        windows: Prompts and the tails decoded after them.
        interval: Steps from one measurement to the next.
    """

    name = "recovery-map"
    measures_heads = True

    def __init__(self, windows: Windows, interval: int) -> None:
        if not 1 <= interval <= windows.tail:
            raise ConfigError(f"--interval {interval}: expected 1 to --tail {windows.tail}")
        super().__init__(windows)
        self.interval = interval

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"interval": self.interval}

    def samples(self, task: str) -> Iterator[Sample]:
        for number, one in enumerate(super().samples(task)):
            yield replace(one, hidden={**one.hidden, "mapped": number == 0})

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        prompt, tails = sample.hidden["prompt"], sample.hidden["tails"]
        if len(tails[0]) < self.interval:
            raise DataError(f"a tail of {len(tails[0])} tokens: too short to measure every {self.interval}th step")
        shares: dict[int, list[list[float]]] = defaultdict(list)  # by layer and sequence: a mean for each head
        relatives: dict[int, list[list[float]]] = defaultdict(list)
        maps: dict[str, Any] = {}
        for first in range(0, len(tails), SEQUENCES):
            cache = evaluated.new_cache()
            part = tails[first : first + SEQUENCES]
            prefill(evaluated.model, cache, prompt, len(part))
            mapped = sample.hidden["mapped"] and first == 0
            measured = measure_heads(cache, self.interval, mapped=mapped)
            decode_tails(evaluated.model, cache, part)
            for layer, found in measured.items():
                share_BG, relative_BG = found.means
                shares[layer] += share_BG.tolist()
                relatives[layer] += relative_BG.tolist()
            if mapped:
                by_layer = {number: found.maps_GN for number, found in measured.items()}
                (block_size,) = {found.layer.block_size for found in measured.values()}
                maps = {"map": map_record(by_layer, self.interval, block_size)}
        layers = sorted(shares)
        return {
            "layers": layers,
            "recovery_map": [_by_head(shares[layer]) for layer in layers],
            "relative_map": [_by_head(relatives[layer]) for layer in layers],
            "prompt_tokens": len(prompt),
            "new_tokens": sum(map(len, tails)),
        } | maps


def _by_head(values: Sequence[Sequence[float]]) -> list[float]:
    return [round(fmean(of_head), 6) for of_head in zip(*values, strict=True)]


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Mean relative recovery of each document over layers and heads; NaN if it failed."""
    return [math.nan if "error" in one else fmean(map(fmean, one["relative_map"])) for one in records]


def mean_map(folder: RunFolder, variant: str, name: str = "relative_map") -> tuple[list[int], list[list[float]]]:
    """Layer numbers, and for each layer its heads' means over all documents; empty while none is done."""
    every = [one for task in folder.tasks for one in folder.records(variant, task) if "error" not in one]
    if not every:
        return [], []
    maps = [one[name] for one in every]
    return every[0]["layers"], [_by_head(heads) for heads in zip(*maps, strict=True)]


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    for variant in plan.variants:
        check_measurable(variant)
    benchmark = RecoveryMap(windows_of(args, continuations=True), args.interval)
    return show_results(run(benchmark, plan), MEASURE, folder_table, plot=args.plot)


def folder_table(folder: RunFolder, measure: Measure) -> str:
    """Recovery and relative recovery in percent: layers down, their mean and their worst head last, variants across."""
    maps = {(variant, name): mean_map(folder, variant, name) for variant in folder.variants for name in _MAPS}
    layers = next((numbers for numbers, _ in maps.values() if numbers), [])
    columns = [heads for _, heads in maps.values()]
    rows: list[tuple[object, ...]] = []
    for place, number in enumerate(layers):
        rows.append((f"layer {number}", *(100 * fmean(heads[place]) if heads else None for heads in columns)))
    rows.append(("all layers", *(100 * fmean(map(fmean, heads)) if heads else None for heads in columns)))
    rows.append(("worst head", *(100 * min(map(min, heads)) if heads else None for heads in columns)))
    titles = [f"{variant} {_MAPS[name]}" for variant, name in maps]
    return text_table(("recovery, %", *titles), rows, notes(mean_scores(folder, measure), measure.failed))


_MAPS = {"recovery_map": "share", "relative_map": "relative"}


def heat_maps(folder: RunFolder) -> HeatMaps | None:
    """The relative recovery of every variant; ``None`` while no document is done."""
    maps = {variant: mean_map(folder, variant) for variant in folder.variants}
    done = {variant: found for variant, found in maps.items() if found[1]}
    if not done:
        return None
    layers, heads = next(iter(done.values()))
    axes = Axes([str(layer) for layer in layers], [str(head) for head in range(len(heads[0]))], "layer", "KV head")
    low = min(0.99, *(min(map(min, of_heads)) for _, of_heads in done.values()))
    panels = [Panel(variant, of_heads) for variant, (_, of_heads) in done.items()]
    return HeatMaps("Relative recovery, by layer and KV head", panels, axes, low)


MEASURE = Measure(
    *("Recovery", "relative recovery, %", sample_scores), failed="left out of the figures", heat_maps=heat_maps
)
