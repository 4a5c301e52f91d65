"""``attnpred bench gather``: blocks from host memory to the pool, on a CPU to a buffer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.eval.bench.parts.options import BLOCK, checked, show
from attention_predictor.eval.bench.parts.stopwatch import Call, timed
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.coded_store import CodedStore, new_store
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.host_store import HostStore, gather_reference
from attention_predictor.progress import Progress
from attention_predictor.settings import offload_config

CHUNK = 4096  # tokens made at once
LISTS = 8  # lists of blocks to cycle through


def main(args: argparse.Namespace) -> int:
    device, dtype = checked(args)
    shape: dict[str, Any] = {
        "batch": args.batch,
        "kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "block_size": BLOCK,
        "dtype": dtype,
    }
    memory = HostMemory([device] if device.type == "cuda" else [])
    store = new_store(offload_config(args).code_bits, **shape, memory=memory)
    for start in range(0, args.context, CHUNK):
        tokens = min(CHUNK, args.context - start)
        made = torch.randn(2, args.batch, args.kv_heads, tokens, args.head_dim, dtype=dtype, device=device)
        store.append(*made)
    store.settle()
    rows, n = args.batch * args.kv_heads, args.blocks
    lists = [(torch.randint(rows, (n,)), torch.randint(store.n_blocks, (n,))) for _ in range(LISTS)]
    methods = _to_pool(store, lists, shape, device) if device.type == "cuda" else _to_buffer(store, lists)
    found = []
    with Progress("gather", len(methods), "ways") as progress:
        for method in methods:
            rules: dict[str, Any] = {"moved": method.blocks * store.block_bytes, "capturable": method.on_device}
            found.append(timed(method.name, method.calls, device, repeats=args.repeats, **rules))
            progress.update()
    return show(args, device, dtype, found)


@dataclass(frozen=True)
class GatherMethod:
    """A way to copy ``blocks`` blocks; ``on_device``: without the host."""

    name: str
    calls: list[Call]
    blocks: int
    on_device: bool = True


def _to_pool(
    store: HostStore, lists: list[tuple[Tensor, Tensor]], shape: dict[str, Any], device: torch.device
) -> list[GatherMethod]:
    n = len(lists[0][0])
    pool, slot_n = BlockPool(**shape, slots=n, device=device), torch.arange(n)
    sides, slabs = (pool.key_BGSTD, pool.value_BGSTD), ops.Slabs(store.addresses(device), store.slab_blocks)
    rows = store.batch * store.kv_heads
    each = max(1, n // rows)
    slot_RS = torch.arange(n, device=device, dtype=torch.int32).expand(rows, n).contiguous()
    moves_R = torch.full((rows,), each, device=device, dtype=torch.int32)
    whole = torch.empty(n, *store.codec.shape, dtype=store.codec.stored, pin_memory=True)
    there = torch.empty_like(whole, device=device, pin_memory=False)
    length_B = torch.full((store.batch,), store.length, device=device)

    def by_table(_: Tensor, block_n: Tensor) -> Call:
        block_RS = block_n.to(device, torch.int32).expand(rows, n).contiguous()
        moves = (slabs, block_RS, slot_RS, moves_R, *sides, None)
        if isinstance(store, CodedStore):
            coded: dict[str, Any] = {"open_R2TD": store.open_R2TD, "length_B": length_B, "bits": store.codec.bits}
            return lambda: ops.move_coded_blocks(*moves, **coded)
        return lambda: ops.move_blocks(*moves)

    def by_host(row_n: Tensor, block_n: Tensor) -> Call:
        return lambda: pool.write_blocks(row_n, slot_n, store.fetch(row_n, block_n, device))

    return [
        GatherMethod("ours", [by_table(*one) for one in lists], each * rows),
        GatherMethod("gathered on the CPU, then copied", [by_host(*one) for one in lists], n, on_device=False),
        GatherMethod("one piece by the copy engine", [lambda: there.copy_(whole, non_blocking=True)], n),
    ]


def _to_buffer(store: HostStore, lists: list[tuple[Tensor, Tensor]]) -> list[GatherMethod]:
    n = len(lists[0][0])
    buffer = torch.empty(n, *store.codec.shape, dtype=store.codec.stored)
    whole, there = torch.empty_like(buffer), torch.empty_like(buffer)

    def by_kernel(row_n: Tensor, block_n: Tensor) -> Call:
        return lambda: store.gather_stored(row_n, block_n, buffer)

    def by_torch(row_n: Tensor, block_n: Tensor) -> Call:
        return lambda: gather_reference(store._slabs, row_n, block_n, buffer)

    return [
        GatherMethod("ours", [by_kernel(*one) for one in lists], n),
        GatherMethod("indexing by torch", [by_torch(*one) for one in lists], n),
        GatherMethod("one piece", [lambda: there.copy_(whole)], n),
    ]
