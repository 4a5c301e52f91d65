"""``attnpred bench prefill``: times the prefill of a long prompt in chunks, by cache setup."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import HostMemoryError, one_line
from attention_predictor.eval.bench.cache_sessions import open_cache, why_too_large
from attention_predictor.eval.bench.cache_setups import PREFILL_SETUPS, STOCK, CacheSetup, named_setup, names_in
from attention_predictor.eval.bench.device import release, wait
from attention_predictor.eval.bench.random_models import random_ids, random_or_loaded
from attention_predictor.eval.bench.timing_report import Row, report
from attention_predictor.loading import find_device
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.progress import Progress
from attention_predictor.sizes import size_text


def main(args: argparse.Namespace) -> int:
    chunk = args.context if args.chunk is None else args.chunk
    device = find_device(args.device)
    if args.ways is None:
        setups = [one for one in PREFILL_SETUPS.values() if device.type == "cuda" or not one.needs_gpu]
    else:
        setups = [named_setup(name, PREFILL_SETUPS, device.type) for name in names_in(args.ways, PREFILL_SETUPS)]
    model = random_or_loaded(args, device, args.context)
    ids_BT = random_ids(model, args.context, args.seed, batch=args.batch)

    rows = []
    with Progress("prefill", len(setups), "ways") as progress:
        for setup in setups:
            progress.describe(f"prefill, {setup.name}")
            rows.append({"name": setup.name} | _time_setup(model, setup, ids_BT, chunk, args))
            if "seconds" in rows[-1]:
                progress.write(_describe(rows[-1]))
            progress.update()
    stock_s = next((row.get("seconds") for row in rows if row["name"] == PREFILL_SETUPS[STOCK].name), None)
    for row in rows:
        if stock_s is not None and "seconds" in row:
            row["to_stock"] = row["seconds"] / stock_s
    settings = {name: getattr(args, name) for name in ("context", "budget", "batch", "repeats", "seed", "dtype")}
    settings |= {"chunk": chunk, "model": args.shape or str(args.model)}
    report("prefill", device, settings, rows, line=_describe, as_json=args.json)
    return 0


def _time_setup(
    model: PreTrainedModel, setup: CacheSetup, ids_BT: Tensor, chunk: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Timings of one setup, or the reason it was ``skipped``: out of memory."""
    sizes = {"context": args.context, "batch": args.batch, "at_once": chunk}
    if reason := why_too_large(model, setup, **sizes, limit_bytes=None):
        return {"skipped": reason}
    try:
        return timed(model, setup, ids_BT, chunk, args.budget, args.repeats)
    except (torch.OutOfMemoryError, HostMemoryError) as error:
        return {"skipped": one_line(error, 200)}
    finally:
        release(model.device)


def timed(
    model: PreTrainedModel, setup: CacheSetup, ids_BT: Tensor, chunk: int, budget: int, repeats: int
) -> dict[str, Any]:
    """Prefill the same prompt into a new cache each time, after a short prefill that warms up."""
    cuda = model.device.type == "cuda"
    weights = sum(weight.nbytes for weight in model.parameters())
    _prefill(model, setup, ids_BT[:, : min(2 * chunk, ceil_div(ids_BT.shape[1], 2))], chunk, budget)
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    times, moved = [], 0
    for _ in range(1 + repeats):
        seconds, moved = _prefill(model, setup, ids_BT, chunk, budget)
        times.append(seconds)
    return {
        "seconds": statistics.median(times[1:]),
        "first_s": times[0],
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) - weights if cuda else None,
        "moved_bytes": moved,
    }


@torch.no_grad()
def _prefill(model: PreTrainedModel, setup: CacheSetup, ids_BT: Tensor, chunk: int, budget: int) -> tuple[float, int]:
    """Seconds until all copies are done, and bytes copied between host and device."""
    B, T = ids_BT.shape
    with open_cache(model, setup, context=T, batch=B, config=OffloadConfig(budget=budget)) as session:
        wait(model.device)
        begun = time.perf_counter()
        for part_BT in ids_BT.split(chunk, dim=1):
            model(part_BT, **with_cache(model, session.cache), logits_to_keep=1)
        wait(model.device)
        seconds = time.perf_counter() - begun
        if session.engine is not None:
            stats = session.engine.stats
            return seconds, stats.full_kv_bytes + stats.streamed_bytes + stats.fetched_bytes
        return seconds, _moved_by_offloading(session.cache, T, chunk) if setup.options.get("offloading") else 0


def _moved_by_offloading(cache: Cache, length: int, chunk: int) -> int:
    """A layer's cache leaves after each chunk, all of it, and comes back before the next (``CacheLayerMixin``)."""
    moved = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and not layer.is_sliding]
    token_bytes = sum(kv.nbytes for layer in moved for kv in (layer.keys, layer.values) if kv is not None) // length
    lengths = [min(start + chunk, length) for start in range(0, length, chunk)]
    return token_bytes * (sum(lengths) + sum(lengths[:-1]))


def _describe(row: Row) -> str:
    ratio = f"{row['to_stock']:6.3f} × stock on the device" if "to_stock" in row else ""
    peak = "" if row["peak_bytes"] is None else f", peak {size_text(row['peak_bytes'])} on top of the weights"
    times = f"{row['seconds']:9.3f} s (at first {row['first_s']:.3f}) {ratio}"
    return f"{row['name']:<36}{times}{peak}, {size_text(row['moved_bytes'])} moved"
