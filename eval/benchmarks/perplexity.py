"""``attnpred eval perplexity``: perplexity of document tails, decoded token by token under each policy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, Sample, run
from attention_predictor.eval.harness.scores import mean_scores, notes, show_results
from attention_predictor.eval.harness.windows import WindowBenchmark, windows_of


class Perplexity(WindowBenchmark):
    """Windows of documents: log-likelihood of each tail.

    ``bytes`` in a record are those of the tail's text, for bits a byte, which don't depend on the tokenizer.
    """

    name = "perplexity"

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        prompt, tail = sample.hidden["prompt"], sample.hidden["tails"][0]
        likelihoods = evaluated.log_likelihoods(prompt, tail)
        text_bytes = len(str(self.windows.tokenizer.decode(tail)).encode())
        found = {"log_likelihood": math.fsum(likelihoods), "tokens": len(likelihoods), "bytes": text_bytes}
        return found | {"prompt_tokens": len(prompt)}


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Bits a token of each document; lower is better. NaN if it failed: there is no worst value."""
    return [_bits([one]) if "error" not in one else math.nan for one in records]


def bits_per_token(folder: RunFolder, variant: str, task: str) -> float | None:
    """Over all tokens of a task's documents; ``None`` where none is done."""
    known = [one for one in folder.records(variant, task) if "error" not in one]
    return _bits(known) if known else None


def _bits(records: Sequence[Record]) -> float:
    tokens = sum(one["tokens"] for one in records)
    return -math.fsum(one["log_likelihood"] for one in records) / tokens / math.log(2)


MEASURE = Measure(
    *("Perplexity", "bits a token, less is better", sample_scores),
    scale=1.0,
    higher=False,
    bounds=(0.0, math.inf),
    weight=lambda record: float(record.get("tokens", 0)),
    failed="left out of the figures",
)


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    return show_results(run(Perplexity(windows_of(args)), plan), MEASURE, folder_table)


def folder_table(folder: RunFolder, measure: Measure) -> str:
    """Bits a token of every document, and of each task all of them and their perplexity: variants across."""
    rows: list[tuple[object, ...]] = []
    for task in folder.tasks:
        by_variant = {
            variant: {one["id"]: score for one, score in zip(records, sample_scores(task, records), strict=True)}
            for variant in folder.variants
            for records in [folder.records(variant, task)]
        }
        names = dict.fromkeys(name for scores in by_variant.values() for name in scores)
        rows += [(name, *(_known(by_variant[one].get(name)) for one in folder.variants)) for name in names]
        bits = [bits_per_token(folder, variant, task) for variant in folder.variants]
        rows.append((f"{task}: all", *bits))
        rows.append((f"{task}: perplexity", *(None if one is None else 2.0**one for one in bits)))
    return text_table(("bits a token", *folder.variants), rows, notes(mean_scores(folder, measure), measure.failed))


def _known(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else score
