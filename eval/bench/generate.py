"""``attnpred bench generate``: the tokens of model.generate against those of engine.generate."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attention_predictor.commands.bench.generate import SKIPPED
from attention_predictor.eval.bench.capture_status import how_taken, why_not_captured
from attention_predictor.eval.bench.random_models import random_ids, random_or_loaded
from attention_predictor.eval.bench.timing_report import Row, report, with_ratios
from attention_predictor.eval.bench.token_clock import TokenClock
from attention_predictor.loading import find_device
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attach import attach
from attention_predictor.progress import Progress

Loop = Callable[[Engine, Tensor, int], Tensor]


def by_engine(engine: Engine, ids_BT: Tensor, new_tokens: int) -> Tensor:
    """``engine.generate``, which no token ends."""
    return engine.generate(ids_BT, max_new_tokens=new_tokens, eos_token_id=[])


def by_model(engine: Engine, ids_BT: Tensor, new_tokens: int) -> Tensor:
    """The attached model's own ``generate``, which no token ends."""
    model, options = engine.model, dict[str, Any]()
    if model.generation_config.eos_token_id is not None:
        options["min_new_tokens"] = new_tokens
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = 0  # avoids a warning; nothing is padded
    return model.generate(  # type: ignore[operator]  # mixed in by a class that mypy does not see
        ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, max_new_tokens=new_tokens, **options
    )


LOOPS: dict[str, Loop] = {"engine.generate": by_engine, "model.generate": by_model}


def main(args: argparse.Namespace) -> int:
    device = find_device(args.device)
    model = random_or_loaded(args, device, args.context + args.new_tokens)
    ids_BT = random_ids(model, args.context, args.seed, batch=args.batch, first=3)
    with attach(model, OffloadConfig(budget=args.budget)) as engine:
        rows, chosen = timed_loops(engine, ids_BT, args.new_tokens, args.repeats)
    same = torch.equal(*chosen)
    settings = {name: getattr(args, name) for name in ("context", "new_tokens", "budget", "batch", "repeats", "seed")}
    settings |= {"model": args.shape or str(args.model), "same_tokens": same}
    report("generate", device, settings, with_ratios(rows, "ms"), line=_describe, as_json=args.json)
    return 0


def timed_loops(
    engine: Engine, ids_BT: Tensor, new_tokens: int, repeats: int
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """A row for each loop, and the tokens each generated, ``[B, T + new]``."""
    times: dict[str, list[float]] = {name: [] for name in LOOPS}
    chosen, rows = {}, []
    with Progress("loops", (1 + repeats) * len(LOOPS), "answers") as progress:
        for name, loop in LOOPS.items():
            for number in range(1 + repeats):
                progress.describe(name)
                engine.stats.reset()
                with TokenClock(engine.model, [SKIPPED]) as clock:
                    chosen[name] = loop(engine, ids_BT, new_tokens)
                if number:  # the first one warms up
                    times[name].append(clock.ms_per_token(SKIPPED))
                progress.update()
            stats = engine.stats.to_dict()
            found = {"ms": statistics.median(times[name]), "all_ms": times[name], "engine": stats}
            rows.append({"name": name} | found | {"not_captured": why_not_captured(engine.config.policy, stats)})
    return rows, list(chosen.values())


def _describe(row: Row) -> str:
    taken = how_taken("predictor", row["engine"])
    return f"{row['name']:<16}{row['ms']:9.2f} ms a token, {row['ratio']:6.3f} × engine.generate, {taken}"
