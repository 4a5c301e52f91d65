"""``attnpred bench stream``: requests of mixed lengths, side by side."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from attention_predictor.arguments import whole_numbers
from attention_predictor.errors import HostMemoryError, one_line
from attention_predictor.eval.bench.device import release, wait
from attention_predictor.eval.bench.random_models import random_or_loaded
from attention_predictor.eval.bench.timing_report import Row, report, with_ratios
from attention_predictor.loading import find_device
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.requests.request import Request
from attention_predictor.progress import Progress
from attention_predictor.settings import offload_config
from attention_predictor.sizes import size_text


def main(args: argparse.Namespace) -> int:
    shortest, longest = whole_numbers("--lengths", args.lengths)
    device = find_device(args.device)
    model = random_or_loaded(args, device, longest + args.new_tokens)
    requests = make_requests(model, args.requests, shortest, longest, args.new_tokens, args.seed)
    rows = []
    for places in whole_numbers("--places", args.places):
        row: dict[str, Any] = {"places": places, "name": f"{places} place" + "s" * (places > 1)}
        try:
            row |= _streamed(model, requests, places, args)
        except (torch.OutOfMemoryError, HostMemoryError) as error:
            row["skipped"] = one_line(error, 200)
        rows.append(row)
        release(device)
    names = ("requests", "lengths", "new_tokens", "budget", "host_kv", "late_fetch", "seed")
    settings = {name: getattr(args, name) for name in names} | {"model": args.shape or str(args.model)}
    report("stream", device, settings, with_ratios(rows, "tokens_per_s"), line=_describe, as_json=args.json)
    return 0


def make_requests(
    model: PreTrainedModel, count: int, shortest: int, longest: int, new_tokens: int, seed: int
) -> list[Request]:
    """Requests of random tokens that end by length alone."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    share_n = torch.rand(count, generator=generator)
    lengths = (shortest * (longest / shortest) ** share_n).long().clamp(shortest, longest).tolist()
    return [
        Request(
            input_ids=torch.randint(vocabulary, (length,), generator=generator),
            max_new_tokens=new_tokens,
            eos_token_id=vocabulary,  # no token
        )
        for length in lengths
    ]


def _streamed(model: PreTrainedModel, requests: list[Request], places: int, args: argparse.Namespace) -> dict[str, Any]:
    device, longest = model.device, max(len(one.input_ids) for one in requests) + args.new_tokens
    first_s: list[float] = []
    with attach(model, offload_config(args)) as engine:
        list(engine.stream([Request(input_ids=requests[0].input_ids[:256], max_new_tokens=8)]))  # compiles, warms up
        wait(device)
        engine.stats.reset()
        started = time.perf_counter()
        with Progress(f"{places} places", len(requests), "requests") as progress:
            for _, _, ending in engine.stream(requests, places=places, max_length=longest):
                if ending is None:
                    continue
                if ending.error is not None:
                    raise ending.error
                first_s.append(time.perf_counter() - started if ending.first_token_s is None else ending.first_token_s)
                progress.update()
        seconds = time.perf_counter() - started
        stats = engine.stats.to_dict()
    return {
        "seconds": seconds,
        "tokens_per_s": len(requests) * args.new_tokens / seconds,
        "first_s": statistics.median(first_s),
        "last_first_s": max(first_s),
        "steps": stats["steps"],
        "fallbacks": stats["fallbacks"],
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _describe(row: Row) -> str:
    peak = "" if row["peak_device_bytes"] is None else f"; peak {size_text(row['peak_device_bytes'])} on the device"
    why = "".join(f"; {message}" for message in row["fallbacks"])
    return (
        f"{row['name']:<12} {row['seconds']:8.1f} s {row['tokens_per_s']:8.1f} tokens/s {row['ratio']:6.2f} ×"
        f"   first token {row['first_s']:.2f} s, at most {row['last_first_s']:.2f}; {row['steps']} steps{peak}{why}"
    )
