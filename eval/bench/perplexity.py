"""``attnpred bench perplexity``: times a token of ``eval perplexity`` under every policy."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from transformers import PreTrainedModel

from attention_predictor.commands.bench.perplexity import SKIPPED
from attention_predictor.commands.bench.policy_options import policies_of
from attention_predictor.eval.bench.capture_status import how_taken, why_not_captured
from attention_predictor.eval.bench.device import wait
from attention_predictor.eval.bench.random_models import random_ids
from attention_predictor.eval.bench.timing_report import Row, report, with_ratios
from attention_predictor.eval.bench.token_clock import TokenClock
from attention_predictor.eval.harness.attached_model import AttachedModel
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.step_series import record_steps
from attention_predictor.eval.harness.variants import Variant
from attention_predictor.loading import find_device, load_model
from attention_predictor.offload.hf.forwards import check_positions
from attention_predictor.progress import Progress

FIGURES = ("token_ms", "later_token_ms", "prompt_ms", "sample_ms")


def main(args: argparse.Namespace) -> int:
    device, names = find_device(args.device), policies_of(args.policies)
    variants = [Variant.of(Rule(name, {"policy": name}), args.budget) for name in names]
    model = load_model(args.model, str(device), args.dtype)
    check_positions(model.config.get_text_config(decoder=True), args.context)
    rows = []
    with Progress("perplexity", len(variants), "policies") as progress:
        for variant in variants:
            progress.describe(variant.name)
            rows.append(timed(model, variant, args.context, args.tail, args.repeats, args.seed))
            progress.update()
    settings = {name: getattr(args, name) for name in ("context", "tail", "budget", "repeats", "seed")}
    settings["model"] = str(args.model)
    report("perplexity", device, settings, with_ratios(rows, "token_ms"), line=_describe, as_json=args.json)
    return 0


def timed(model: PreTrainedModel, variant: Variant, context: int, tail: int, repeats: int, seed: int) -> dict[str, Any]:
    """A policy's row: medians over samples, after a first one that attaches and warms up."""
    samples, stats = [], None
    with AttachedModel(model, variant) as attached:
        for number in range(1 + repeats):
            sample, stats = _sample(attached, context, tail, seed + number)
            samples.append(sample)
    row: dict[str, Any] = {"name": variant.policy}
    row |= {figure: statistics.median(sample[figure] for sample in samples[1:]) for figure in FIGURES}
    row |= {"attach_ms": samples[0]["attach_ms"], "first_sample_ms": samples[0]["sample_ms"]}
    if stats is not None:
        row |= {"engine": stats, "not_captured": why_not_captured(variant.policy, stats)}
    return row


def _sample(
    attached: AttachedModel, context: int, tail: int, seed: int
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Times of one sample, run as the runner runs it, and the engine's stats."""
    model = attached.model
    ids = random_ids(model, context, seed)[0].tolist()
    stats = None
    wait(model.device)
    begun = time.perf_counter()
    with attached.sample() as engine, record_steps(model, engine):
        attach_ms = 1000 * (time.perf_counter() - begun)
        with TokenClock(model, [0, SKIPPED]) as clock:
            EvaluatedModel(model, engine).log_likelihoods(ids[: context - tail], ids[context - tail :])
        if engine is not None:
            stats = engine.stats.to_dict()
    return {
        "token_ms": clock.ms_per_token(0),
        "later_token_ms": clock.ms_per_token(SKIPPED),
        "attach_ms": attach_ms,
        "prompt_ms": clock.ms_before(0),
        "sample_ms": 1000 * (time.perf_counter() - begun),
    }, stats


def _describe(row: Row) -> str:
    taken = "the stock model" if "engine" not in row else how_taken(row["name"], row["engine"])
    parts = [
        f"{row['name']:<16}{row['token_ms']:9.2f} ms a token, {row['ratio']:6.2f} × the first",
        f"without the first {SKIPPED}: {row['later_token_ms']:9.2f}",
        f"attaching {row['attach_ms']:.0f}, prompt {row['prompt_ms']:.0f}",
        taken,
    ]
    return "; ".join(parts)
