"""``attnpred bench attention``: one token over the blocks of a pool."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.eval.bench.parts.options import BLOCK, checked, show
from attention_predictor.eval.bench.parts.stopwatch import Call, input_sets, timed
from attention_predictor.eval.bench.timing_report import Row
from attention_predictor.offload.attention.dense import Terms
from attention_predictor.offload.attention.sparse import attend_slots
from attention_predictor.progress import Progress

WORKSPACE_BYTES = 128 << 20  # workspace for FlashInfer


def main(args: argparse.Namespace) -> int:
    device, dtype = checked(args)
    B, H, G, S, D = args.batch, args.heads, args.kv_heads, ceil_div(args.budget, BLOCK), args.head_dim
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    moved = 2 * B * G * S * BLOCK * D * dtype.itemsize

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        key_BGSTD, value_BGSTD = (torch.randn(B, G, S, BLOCK, D, **made) for _ in range(2))
        return torch.randn(B, H, D, **made), key_BGSTD, value_BGSTD

    sets = [inputs() for _ in range(input_sets(moved, device))]
    block_BGS = torch.arange(S, device=device).expand(B, G, S).contiguous()
    rest = (block_BGS, torch.full((B,), S * BLOCK, device=device), None, Terms(D**-0.5))

    def ours(query: Tensor, key: Tensor, value: Tensor, kernel: bool) -> Call:
        return lambda: attend_slots(query, key, value, *rest, kernel=kernel)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Call:
        flat = query[:, :, None], key.flatten(2, 3), value.flatten(2, 3)
        return lambda: torch.nn.functional.scaled_dot_product_attention(*flat, enable_gqa=True)

    def copied(key: Tensor, value: Tensor) -> Call:
        there = torch.empty_like(key), torch.empty_like(value)
        return lambda: (there[0].copy_(key), there[1].copy_(value))

    paged = flashinfer_calls(sets)
    methods: list[tuple[str, list[Call] | str, int]] = [
        ("ours, with block scores", [ours(*one, kernel=True) for one in sets], moved),
        ("torch operations, with block scores", [ours(*one, kernel=False) for one in sets], moved),
        ("scaled_dot_product_attention, without", [sdpa(*one) for one in sets], moved),
        ("FlashInfer's paged decode, without", paged, moved),
        ("a copy on the device", [copied(*one[1:]) for one in sets], 2 * moved),
    ]
    rows: list[Row] = []
    with Progress("attention", len(methods), "ways") as progress:
        for name, calls, nbytes in methods:
            if isinstance(calls, str):
                rows.append({"name": name, "skipped": calls})
            else:
                rows.append(timed(name, calls, device, repeats=args.repeats, moved=nbytes))
            progress.update()
    return show(args, device, dtype, rows)


def flashinfer_calls(sets: list[tuple[Tensor, Tensor, Tensor]]) -> list[Call] | str:
    """FlashInfer's decode over the same tokens, or the reason it can't run."""
    (B, H, _), (_, G, S, T, D), device = sets[0][0].shape, sets[0][1].shape, sets[0][0].device
    if device.type != "cuda":
        return "it needs a CUDA device"
    if sets[0][0].dtype == torch.float32:
        return "it takes half precisions alone"
    try:
        import flashinfer
    except ImportError:
        return "flashinfer is not installed"
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=H // G >= 4)
    index: dict[str, Any] = {"dtype": torch.int32, "device": device}
    wrapper.plan(
        torch.arange(0, B * S + 1, S, **index),  # first page of each sequence
        torch.arange(B * S, **index),  # the pages
        torch.full((B,), T, **index),  # tokens in each sequence's last one
        H,
        G,
        D,
        T,
        q_data_type=sets[0][0].dtype,
        kv_data_type=sets[0][0].dtype,
    )

    def call(query_BHD: Tensor, *kv_BGSTD: Tensor) -> Call:
        pages = tuple(side.transpose(1, 2).flatten(0, 1).contiguous() for side in kv_BGSTD)
        return lambda: wrapper.run(query_BHD, pages)

    return [call(*one) for one in sets]
