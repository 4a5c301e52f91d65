"""``attnpred bench throughput``: tokens a second by context and batch, ours against the cache on the device."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from attention_predictor.arguments import whole_numbers
from attention_predictor.errors import ConfigError, HostMemoryError
from attention_predictor.eval.bench.cache_sessions import choose_setups, free_device_bytes, why_too_large
from attention_predictor.eval.bench.cache_setups import CACHE_SETUPS, CacheSetup
from attention_predictor.eval.bench.decode_timing import Workload, steps_within, time_setup
from attention_predictor.eval.bench.device import limit_memory
from attention_predictor.eval.bench.random_models import random_or_loaded
from attention_predictor.eval.bench.synthetic_cache import PAST, Locality
from attention_predictor.eval.bench.timing_report import Row, machine, report
from attention_predictor.eval.bench.timings_file import TimingsFile
from attention_predictor.eval.display.plots import plot_throughput
from attention_predictor.loading import find_device
from attention_predictor.offload.hf.attach import attach
from attention_predictor.progress import Progress
from attention_predictor.sizes import size_text

MOST = 4096  # sequences; larger batches are not looked for


def main(args: argparse.Namespace) -> int:
    contexts = sorted(set(whole_numbers("--contexts", args.contexts)))
    batches = sorted(set(whole_numbers("--batches", args.batches)))
    if min(contexts) < (least := steps_within(args.steps) + PAST):
        raise ConfigError(f"--contexts {min(contexts)}: expected at least {least}, for steps and {PAST} tokens before")
    device = find_device(args.device)
    limit_bytes = limit_memory(args.memory_limit, device)
    ways = choose_setups(args.ways or ("graph,resident" if device.type == "cuda" else "thread,resident"), device)
    settings = {
        name: getattr(args, name) for name in ("budget", "host_kv", "late_fetch", "steps", "seed", "memory_limit")
    }
    settings |= {"model": args.shape or str(args.model), "dtype": args.dtype, "locality": asdict(Locality())}
    timings = TimingsFile(args.out, settings | {"machine": machine(device)})
    plan = [(context, batch) for context in contexts for batch in batches]
    todo = [
        (context, batch, missing)
        for context, batch in plan
        if (missing := [way for way in ways if timings.find(context=context, batch=batch, way=way) is None])
    ]
    if todo:
        _sweep(random_or_loaded(args, device, max(contexts)), todo, args, limit_bytes, timings)
    found = [timings.find(context=context, batch=batch, way=way) for context, batch in plan for way in ways]
    rows = against_resident([row for row in found if row is not None])
    report("throughput", device, settings, rows, line=describe, as_json=args.json)
    if args.plot is not None:
        title = f"{settings['model']}, budget {args.budget}, host KV {args.host_kv}\n{machine(device)}"
        plot_throughput(rows, args.plot, title)
    return 0


def _sweep(
    model: PreTrainedModel,
    todo: list[tuple[int, int, list[str]]],
    args: argparse.Namespace,
    limit_bytes: int | None,
    timings: TimingsFile,
) -> None:
    """Time ways at contexts and batches; all ways of a context and batch share its synthetic cache."""
    with Progress("decoding", sum(len(ways) for *_, ways in todo), "measurements") as progress:
        for context, batch, ways in todo:
            work = Workload.of(model, context, argparse.Namespace(**vars(args) | {"batch": batch}), limit_bytes)
            for way in ways:
                setup = CACHE_SETUPS[way]
                progress.describe(f"{setup.name}, {batch} × {context} tokens")
                row = {"way": way} | time_setup(model, setup, work)
                if "median_ms" in row:
                    row["tokens_per_second"] = 1000 * batch / row["median_ms"]
                row["largest_batch"] = largest_batch(model, setup, work, row)
                timings.add(row)
                progress.update()


def largest_batch(model: PreTrainedModel, setup: CacheSetup, work: Workload, row: Row) -> int | None:
    """Most sequences of the context that fit, by what a sequence takes of host and device memory.

    Of ours, the device's part is what the timed row held; ``None`` if there is no such row.
    """
    if setup.kind != "ours":
        sizes = {"context": work.context, "at_once": work.at_once}
        limit_bytes = work.limit_bytes
        return most(lambda batch: why_too_large(model, setup, **sizes, batch=batch, limit_bytes=limit_bytes) is None)
    if "engine" not in row:
        return None
    with attach(model, replace(work.config, **setup.options)) as engine:

        def fits(batch: int) -> bool:
            try:
                engine.check_fits(batch=batch, tokens=work.context)
            except HostMemoryError:
                return False
            return True

        by_host = most(fits)
    if model.device.type != "cuda":
        return by_host
    beyond_weights = row["peak_device_bytes"] - row["weights_bytes"]
    return min(by_host, free_device_bytes(model.device, work.limit_bytes) * work.batch // max(beyond_weights, 1))


def against_resident(rows: Sequence[Row]) -> list[Row]:
    """Add ``to_resident``: tokens a second, against the most with the whole cache on the device at any batch."""
    best: dict[int, float] = {}
    for row in rows:
        if CACHE_SETUPS[row["way"]].kind == "resident" and "tokens_per_second" in row:
            best[row["context"]] = max(row["tokens_per_second"], best.get(row["context"], 0.0))
    return [
        {**row, "to_resident": row["tokens_per_second"] / best[row["context"]]}
        if "tokens_per_second" in row and row["context"] in best
        else row
        for row in rows
    ]


def most(fits: Callable[[int], bool]) -> int:
    """The largest number up to ``MOST`` that fits, given that all smaller ones do; 0: none."""
    low, high = 0, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe(row: Row) -> str:
    """The printed lines of a timed row."""
    largest = ratio = ""
    if row["largest_batch"] is not None:
        largest = f", {row['largest_batch']}{' or more' * (row['largest_batch'] == MOST)} sequences fit"
    if "to_resident" in row:
        ratio = f", {row['to_resident']:.2f} × the most with all on the device"
    lines = [
        f"{row['batch']:>4} × {row['context']:<7} {row['name']:<30} {row['tokens_per_second']:9.1f} tokens/s{ratio}, "
        f"{row['median_ms']:8.2f} ms a step, 95%: {row['p95_ms']:8.2f}{largest}"
    ]
    facts = []
    if row["peak_device_bytes"] is not None:
        facts.append(f"peak {size_text(row['peak_device_bytes'])} on the device")
    if "attention" in row:
        facts.append(f"attention by {row['attention']}" + ("" if row["captured"] else ", not captured: on a CPU"))
    if "engine" in row:
        facts += _traffic(row, row["engine"])
    return "\n              ".join([*lines, "; ".join(facts)])


def _traffic(row: Row, stats: dict[str, Any]) -> list[str]:
    waited_ms = row["exposed_wait_ms_per_token"]
    return [
        f"KV {size_text(stats['host_kv_bytes'])} in host memory, {size_text(stats['device_kv_bytes'])} on the device",
        f"{size_text(row['fetched_bytes_per_token'])} fetched a step",
        f"{waited_ms:.2f} ms waited ({waited_ms / row['median_ms']:.1%})",
        *(f"fallback ×{count}: {message}" for message, count in stats["fallbacks"].items()),
    ]
