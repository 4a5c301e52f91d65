"""Time whole decoding steps of a model behind a long prompt, with its cache in host memory and with stock caches.

The prompt and the tokens decoded are random, the same for all ways; the prefill is not timed. Ways: ours, with the
prefetch thread; ours without kernels; the stock cache on the device; on a GPU also the stock cache that is offloaded
layer by layer.

Milliseconds a token, median and 95th percentile, and the ratio of each median to ours.

examples:
  attnpred bench decode --context 8192 --budget 512
  attnpred bench decode --model meta-llama/Llama-3.1-8B --context 32768 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from attention_predictor.arguments import add_model_arguments
from attention_predictor.loading import load_model
from attention_predictor.offload.attach import attach
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import check_positions
from attention_predictor.offload.stats import Stats
from attention_predictor.predictor.errors import ConfigError

WARM_UP = 3  # steps


@dataclass
class Way:
    """One way to hold the cache: milliseconds a token, and what the engine counted, if it is ours."""

    name: str
    median_ms: float
    p95_ms: float
    engine: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens of prompt and steps (%(default)s)"
    )
    parser.add_argument("--budget", type=int, default=1024, metavar="N", help="tokens a step attends to (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences, all the same (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="timed, after 3 more (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.batch < 1:
        raise ConfigError("--steps and --batch must be at least 1")
    if args.context <= args.steps + WARM_UP:
        raise ConfigError(f"--context {args.context}: expected more than the {args.steps + WARM_UP} steps within it")
    ours = OffloadConfig(budget=args.budget)
    model = load_model(args.model, args.device, args.dtype)
    check_positions(model.config.get_text_config(decoder=True), args.context)
    torch.manual_seed(args.seed)
    ids_1T = torch.randint(model.config.vocab_size, (1, args.context), device=model.device)

    def stock(**options: Any) -> Callable[[], Any]:
        @contextmanager
        def made() -> Iterator[tuple[Cache, Stats | None]]:
            yield DynamicCache(config=model.config.get_text_config(decoder=True), **options), None

        return made

    def offloaded(config: OffloadConfig) -> Callable[[], Any]:
        @contextmanager
        def made() -> Iterator[tuple[Cache, Stats | None]]:
            with attach(model, config) as engine:
                yield engine.new_cache(), engine.stats

        return made

    ways = {
        "ours": offloaded(ours),
        "ours, kernels=none": offloaded(OffloadConfig(budget=args.budget, kernels="none")),
        "stock cache on the device": stock(),
    }
    if model.device.type == "cuda":
        ways["stock cache, offloaded"] = stock(offloading=True)
    found = [timed(model, name, way, ids_1T, args) for name, way in tqdm(ways.items(), disable=None, leave=False)]
    machine = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    settings = {name: getattr(args, name) for name in ("context", "budget", "batch", "steps")} | {
        "model": str(args.model)
    }
    if args.json:
        rows = [asdict(way) | {"ratio": way.median_ms / found[0].median_ms} for way in found]
        print(json.dumps({"part": "decode", "machine": machine, "settings": settings, "timings": rows}))
        return 0
    print(
        f"decode, {machine}, {torch.get_num_threads()} threads: " + ", ".join(f"{k} {v}" for k, v in settings.items())
    )
    for way in found:
        ratio = way.median_ms / found[0].median_ms
        print(f"  {way.name:<28} {way.median_ms:9.2f} ms a token, 95%: {way.p95_ms:9.2f} ms   {ratio:6.2f} × ours")
    return 0


@torch.no_grad()
def timed(model: PreTrainedModel, name: str, way: Callable[[], Any], ids_1T: Tensor, args: argparse.Namespace) -> Way:
    """Prefill, then steps one by one."""
    steps = args.steps + WARM_UP
    with way() as (cache, stats):
        model(ids_1T[:, :-steps], past_key_values=cache, logits_to_keep=1)
        if args.batch > 1:
            cache.batch_repeat_interleave(args.batch)
        times = []
        for token_1T in ids_1T[:, -steps:].split(1, dim=1):
            begun = time.perf_counter()
            model(token_1T.expand(args.batch, 1), past_key_values=cache)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(1000 * (time.perf_counter() - begun))
        engine = {} if stats is None else stats.to_dict()
    times = sorted(times[WARM_UP:])
    return Way(name, statistics.median(times), times[int(0.95 * (len(times) - 1))], engine)
