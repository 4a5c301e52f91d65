"""Time the prefill of a long prompt, with keys and values leaving for host memory and with stock caches, side by side.

The prompt goes through the model in chunks of --chunk tokens; every chunk after the first attends to what is cached.
Ways: ours; ours without sketch and history (policy streaming), which tells what they cost; transformers' DynamicCache
on the device; on a GPU the same offloaded layer by layer.

For each: seconds, the median of --repeats, and of the first time, which also allocates host memory; the ratio to the
stock cache on the device; the largest device memory on top of the weights; bytes moved between host and device, counted
for ours, computed for the offloaded cache. What does not fit in memory is skipped, and it is said why. While it runs,
each way's figures go to standard error as soon as they are known.

examples:
  attnpred bench prefill --context 8192 --chunk 2048
  attnpred bench prefill --shape llama-3.1-8b --context 131072 --chunk 16384 --json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from attention_predictor.arguments import add_model_arguments
from attention_predictor.eval.bench import Row, report
from attention_predictor.eval.shapes import SHAPES, check_shape, random_model, shape_config
from attention_predictor.eval.ways import WAYS, Way, does_not_fit, opened
from attention_predictor.loading import DTYPES, find_device, load_model
from attention_predictor.offload.forwards import check_positions
from attention_predictor.offload.versions import with_cache
from attention_predictor.predictor.errors import ConfigError, HostMemoryError, one_line

GIB = 1 << 30
STOCK = "device"
PREFILLS = {
    "ours": Way("ours", "ours"),
    "bare": Way("ours, without sketch and history", "ours", {"policy": "streaming"}),
    STOCK: WAYS[STOCK],
    "offloaded": WAYS["offloaded"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--shape", metavar="S", help=f"a random model in place of --model: one of {', '.join(SHAPES)}")
    add("--context", type=int, default=8192, metavar="N", help="tokens of the prompt (%(default)s)")
    add("--chunk", type=int, metavar="N", help="tokens that go through the model at once (default: all)")
    add("--budget", type=int, default=1024, metavar="N", help="tokens that steps would attend to (%(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="sequences of the same tokens (%(default)s)")
    add("--ways", default=",".join(PREFILLS), metavar="W,…", help="who takes part, and in what order (%(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="timed, after one more (%(default)s)")
    add("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    chunk = args.context if args.chunk is None else args.chunk
    for name, value in (("context", args.context), ("chunk", chunk), ("batch", args.batch), ("repeats", args.repeats)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1")
    names = [name.strip() for name in args.ways.split(",")]
    if unknown := sorted(set(names) - PREFILLS.keys()):
        raise ConfigError(f"--ways {', '.join(unknown)}: expected some of {', '.join(PREFILLS)}")
    device = find_device(args.device)
    ways = [PREFILLS[name] for name in names if device.type == "cuda" or not PREFILLS[name].needs_gpu]
    model = random_or_loaded(args, device, args.context)
    ids_BT = _prompt(model, args)

    rows = []
    for way in tqdm(ways, disable=None, leave=False):
        row: dict[str, Any] = {"name": way.name}
        if reason := does_not_fit(model, way, context=args.context, batch=args.batch, limit_bytes=None):
            rows.append(row | {"skipped": reason})
            continue
        try:
            rows.append(row | timed(model, way, ids_BT, chunk, args.budget, args.repeats))
            tqdm.write(_describe(rows[-1]), file=sys.stderr)
        except (torch.OutOfMemoryError, HostMemoryError) as error:
            rows.append(row | {"skipped": one_line(error, 200)})
        _release(device)
    stock_s = next((row.get("seconds") for row in rows if row["name"] == PREFILLS[STOCK].name), None)
    for row in rows:
        if stock_s is not None and "seconds" in row:
            row["to_stock"] = row["seconds"] / stock_s
    settings = {name: getattr(args, name) for name in ("context", "budget", "batch", "repeats", "seed", "dtype")}
    settings |= {"chunk": chunk, "model": args.shape or str(args.model)}
    report("prefill", device, settings, rows, line=_describe, as_json=args.json)
    return 0


def timed(model: PreTrainedModel, way: Way, ids_BT: Tensor, chunk: int, budget: int, repeats: int) -> dict[str, Any]:
    """Prefills of the same prompt, each into a new cache, behind a short one that warms up."""
    cuda = model.device.type == "cuda"
    weights = sum(weight.nbytes for weight in model.parameters())
    _prefill(model, way, ids_BT[:, : min(2 * chunk, -(-ids_BT.shape[1] // 2))], chunk, budget)
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    times, moved = [], 0
    for _ in range(1 + repeats):
        seconds, moved = _prefill(model, way, ids_BT, chunk, budget)
        times.append(seconds)
    return {
        "seconds": statistics.median(times[1:]),
        "first_s": times[0],
        "peak_bytes": torch.cuda.max_memory_allocated(model.device) - weights if cuda else None,
        "moved_bytes": moved,
    }


@torch.no_grad()
def _prefill(model: PreTrainedModel, way: Way, ids_BT: Tensor, chunk: int, budget: int) -> tuple[float, int]:
    """Seconds until everything is where it belongs, and bytes that passed between host and device."""
    B, T = ids_BT.shape
    with opened(model, way, context=T, batch=B, budget=budget) as session:
        _wait(model.device)
        begun = time.perf_counter()
        for part_BT in ids_BT.split(chunk, dim=1):
            model(part_BT, **with_cache(model, session.cache), logits_to_keep=1)
        _wait(model.device)
        seconds = time.perf_counter() - begun
        if session.engine is not None:
            stats = session.engine.stats
            return seconds, stats.full_kv_bytes + stats.streamed_bytes + stats.fetched_bytes
        return seconds, _moved_by_offloading(session.cache, T, chunk) if way.options.get("offloading") else 0


def _moved_by_offloading(cache: Cache, length: int, chunk: int) -> int:
    """A layer's cache leaves after each chunk, all of it, and comes back before the next (``CacheLayerMixin``)."""
    moved = [layer for layer in cache.layers if isinstance(layer, DynamicLayer) and not layer.is_sliding]
    token_bytes = sum(kv.nbytes for layer in moved for kv in (layer.keys, layer.values) if kv is not None) // length
    lengths = [min(start + chunk, length) for start in range(0, length, chunk)]
    return token_bytes * (sum(lengths) + sum(lengths[:-1]))


def random_or_loaded(args: argparse.Namespace, device: torch.device, tokens: int) -> PreTrainedModel:
    """A random model of ``--shape``, or ``--model``, with positions for so many tokens."""
    if args.shape is None:
        model = load_model(args.model, args.device, args.dtype)
        check_positions(model.config.get_text_config(decoder=True), tokens)
        return model
    check_shape(args.shape)
    if args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype}: expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[args.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_model(shape_config(args.shape, tokens), device, dtype, args.seed)


def _prompt(model: PreTrainedModel, args: argparse.Namespace) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(vocabulary, (1, args.context), generator=generator).expand(args.batch, -1).to(model.device)


def _describe(row: Row) -> str:
    ratio = f"{row['to_stock']:6.3f} × stock on the device" if "to_stock" in row else ""
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / GIB:.2f} GiB on top of the weights"
    times = f"{row['seconds']:9.3f} s (at first {row['first_s']:.3f}) {ratio}"
    return f"{row['name']:<36}{times}{peak}, {row['moved_bytes'] / GIB:.2f} GiB moved"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    """Give back what the last way held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
