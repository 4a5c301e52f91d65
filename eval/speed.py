"""Time a part of a decoding step against what it replaces, in one process.

attention: one token over the blocks of a pool. Our kernel, the torch operations it replaces, and torch's own
scaled_dot_product_attention over the same keys and values, which gives no block scores.

sketch: what a query makes of every block of the context, by the 2-bit keys. Our kernel, which is for CPUs as yet, and
the torch operations it replaces.

gather: scattered blocks from host memory to the pool. Our kernel (on a GPU it reads pinned memory itself), what it
replaces, and a plain copy of as many bytes in one piece, which is the bus at its best.

Each figure is the median of --repeats runs.

examples:
  attnpred bench attention --batch 16
  attnpred bench gather --blocks 2048 --json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

from attention_predictor.csrc import ops
from attention_predictor.eval.bench import report
from attention_predictor.loading import DTYPES, find_device
from attention_predictor.offload.block_pool import BlockPool
from attention_predictor.offload.dense import Terms
from attention_predictor.offload.host_store import HostStore, gather_reference
from attention_predictor.offload.sparse import attend_slots
from attention_predictor.predictor.errors import ConfigError
from attention_predictor.predictor.sketch import KeySketch

BLOCK = 16
CHUNK = 4096  # tokens made at once


@dataclass(frozen=True)
class Timing:
    """One way to do a part: milliseconds, and bytes it must move a second."""

    name: str
    ms: float
    gb_per_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--dtype", default="auto", choices=sorted(DTYPES), help="auto: bf16 on a GPU, else fp32")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (%(default)s)")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="N", help="KV heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N", help="head size (%(default)s)")
    parser.add_argument("--budget", type=int, default=1024, metavar="N", help="tokens attended to (%(default)s)")
    parser.add_argument("--context", type=int, default=32768, metavar="N", help="tokens in host memory (%(default)s)")
    parser.add_argument("--blocks", type=int, default=1024, metavar="N", help="blocks gathered (%(default)s)")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    numbers = ("batch", "heads", "kv_heads", "head_dim", "budget", "context", "blocks", "repeats")
    for name in numbers:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.heads % args.kv_heads:
        raise ConfigError(f"--heads {args.heads}: expected a multiple of --kv-heads {args.kv_heads}")
    device = find_device(args.device)
    dtype = DTYPES[args.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if (reason := ops.missing(device)) is not None:
        raise ConfigError(f"there are no kernels to time: {reason}")
    torch.manual_seed(args.seed)
    part = args.subcommand
    timings = {"attention": attention, "sketch": sketch, "gather": gather}[part](args, device, dtype)
    settings = {name: getattr(args, name) for name in numbers} | {"dtype": str(dtype).removeprefix("torch.")}
    line = "{name:<44} {ms:9.3f} ms {gb_per_s:8.1f} GB/s"
    report(part, device, settings, [asdict(one) for one in timings], by="ms", line=line, as_json=args.json)
    return 0


def attention(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Timing]:
    """One token over a pool of `budget` tokens."""
    slots = -(-args.budget // BLOCK)
    shape = (args.batch, args.kv_heads, slots, BLOCK, args.head_dim)
    query_BHD = torch.randn(args.batch, args.heads, args.head_dim, device=device, dtype=dtype)
    key_BGSTD, value_BGSTD = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    block_BGS = torch.arange(slots, device=device).expand(args.batch, args.kv_heads, slots).contiguous()
    arguments = (query_BHD, key_BGSTD, value_BGSTD, block_BGS, slots * BLOCK, None, Terms(args.head_dim**-0.5))

    def sdpa() -> object:
        key, value = key_BGSTD.flatten(2, 3), value_BGSTD.flatten(2, 3)
        return torch.nn.functional.scaled_dot_product_attention(query_BHD[:, :, None], key, value, enable_gqa=True)

    ways: dict[str, Callable[[], object]] = {
        "ours, with block scores": lambda: attend_slots(*arguments, kernel=True),
        "torch operations, with block scores": lambda: attend_slots(*arguments),
        "scaled_dot_product_attention, without": sdpa,
    }
    moved = key_BGSTD.nbytes + value_BGSTD.nbytes
    return [timed(name, way, moved, args.repeats, device) for name, way in ways.items()]


def sketch(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Timing]:
    """Scores of all blocks of the context."""
    if device.type != "cpu":
        raise ConfigError("bench sketch: its kernel is for CPUs alone; expected --device cpu")
    keys = KeySketch(batch=args.batch, kv_heads=args.kv_heads, head_dim=args.head_dim, dtype=dtype, device=device)
    query_BHQD = torch.randn(args.batch, args.heads, 64, args.head_dim, dtype=dtype)
    for start in range(0, args.context, CHUNK):
        tokens = min(CHUNK, args.context - start)
        keys.extend(torch.randn(args.batch, args.kv_heads, tokens, args.head_dim, dtype=dtype), query_BHQD)
    query_BHD, scaling = query_BHQD[:, :, 0], args.head_dim**-0.5
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: keys.block_scores(query_BHD, scaling, block_size=BLOCK, kernel=True),
        "torch operations": lambda: keys.block_scores(query_BHD, scaling, block_size=BLOCK),
    }
    return [timed(name, way, keys.nbytes, args.repeats, device) for name, way in ways.items()]


def gather(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Timing]:
    """Scattered blocks of a store to a pool, or on a CPU to a buffer."""
    shape = {"batch": args.batch, "kv_heads": args.kv_heads, "head_dim": args.head_dim, "dtype": dtype}
    store = HostStore(**shape, pin=device.type == "cuda")
    for start in range(0, args.context, CHUNK):
        tokens = min(CHUNK, args.context - start)
        store.append(*torch.randn(2, args.batch, args.kv_heads, tokens, args.head_dim, dtype=dtype))
    rows = args.batch * args.kv_heads
    row_n, block_n = torch.randint(rows, (args.blocks,)), torch.randint(store.n_blocks, (args.blocks,))
    moved = args.blocks * 2 * BLOCK * args.head_dim * dtype.itemsize
    if device.type == "cuda":
        pool = BlockPool(**shape, slots=args.blocks, block_size=BLOCK, device=device)
        slot_n = torch.arange(args.blocks)
        whole = torch.empty(moved, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(moved, dtype=torch.uint8, device=device)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: store.gather_to_pool(row_n, block_n, slot_n, pool),
            "gathered on the CPU, then copied": lambda: pool.write_blocks(row_n, slot_n, store.gather(row_n, block_n)),
            "one piece by the copy engine": lambda: there.copy_(whole, non_blocking=True),
        }
    else:
        buffer = torch.empty(args.blocks, 2, BLOCK, args.head_dim, dtype=dtype)
        whole, there = torch.empty(moved, dtype=torch.uint8), torch.empty(moved, dtype=torch.uint8)
        ways = {
            "ours": lambda: store.gather(row_n, block_n, buffer),
            "indexing by torch": lambda: gather_reference(store._slabs, row_n, block_n, buffer),
            "one piece": lambda: there.copy_(whole),
        }
    return [timed(name, way, moved, args.repeats, device) for name, way in ways.items()]


def timed(name: str, way: Callable[[], object], moved: int, repeats: int, device: torch.device) -> Timing:
    """Median time of a call that moves so many bytes."""
    times = []
    for _ in range(repeats + 3):  # the first three warm up
        begun = time.perf_counter()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            way()
            times.append(1000 * (time.perf_counter() - begun))
    ms = median(times[3:])
    return Timing(name, ms, moved / ms / 1e6)
