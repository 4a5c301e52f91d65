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
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from attention_predictor.arguments import add_model_arguments
from attention_predictor.eval.bench import report
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

    ways: dict[str, OffloadConfig | dict[str, Any]] = {
        "ours": ours,
        "ours, kernels=none": OffloadConfig(budget=args.budget, kernels="none"),
        "stock cache on the device": {},
    }
    if model.device.type == "cuda":
        ways["stock cache, offloaded"] = {"offloading": True}
    found = [timed(model, name, way, ids_1T, args) for name, way in tqdm(ways.items(), disable=None, leave=False)]
    settings = {name: getattr(args, name) for name in ("context", "budget", "batch", "steps")}
    settings["model"] = str(args.model)
    line = "{name:<28} {median_ms:9.2f} ms a token, 95%: {p95_ms:9.2f} ms"
    rows = [asdict(way) for way in found]
    report("decode", model.device, settings, rows, by="median_ms", line=line, as_json=args.json)
    return 0


@contextmanager
def opened(model: PreTrainedModel, way: OffloadConfig | dict[str, Any]) -> Iterator[tuple[Cache, Stats | None]]:
    """A cache of ours, or a stock one with these options; the model is attached for as long as it is ours."""
    if isinstance(way, OffloadConfig):
        with attach(model, way) as engine:
            yield engine.new_cache(), engine.stats
    else:
        yield DynamicCache(config=model.config.get_text_config(decoder=True), **way), None


@torch.no_grad()
def timed(
    model: PreTrainedModel, name: str, way: OffloadConfig | dict[str, Any], ids_1T: Tensor, args: argparse.Namespace
) -> Way:
    """Prefill, then steps one by one."""
    steps = args.steps + WARM_UP
    with opened(model, way) as (cache, stats):
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
