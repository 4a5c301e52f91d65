"""``attnpred bench sketch``: scores of all blocks by the key sketch."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from attention_predictor.eval.bench.parts.options import BLOCK, checked, show
from attention_predictor.eval.bench.parts.stopwatch import Call, input_sets, timed
from attention_predictor.eval.bench.timing_report import Row
from attention_predictor.predictor.sketch import KeySketch
from attention_predictor.progress import Progress

CHUNK = 4096  # tokens made at once


def main(args: argparse.Namespace) -> int:
    device, dtype = checked(args)
    query_BHQD = torch.randn(args.batch, args.heads, 64, args.head_dim, device=device, dtype=dtype)

    def filled() -> KeySketch:
        keys = KeySketch(batch=args.batch, kv_heads=args.kv_heads, head_dim=args.head_dim, dtype=dtype, device=device)
        for start in range(0, args.context, CHUNK):
            shape = (args.batch, args.kv_heads, min(CHUNK, args.context - start), args.head_dim)
            keys.extend(torch.randn(shape, device=device, dtype=dtype), query_BHQD)
        return keys

    first = filled()
    sketches = [first, *(filled() for _ in range(input_sets(first.nbytes, device) - 1))]
    query_BHD = query_BHQD[:, :, 0].contiguous()

    def call(keys: KeySketch, query_BHD: Tensor, kernel: bool) -> Call:
        return lambda: keys.block_scores(query_BHD, args.head_dim**-0.5, block_size=BLOCK, kernel=kernel)

    rows: list[Row] = []
    methods = (("ours", True), ("torch operations", False))
    with Progress("sketch", len(methods), "ways") as progress:
        for name, kernel in methods:
            if kernel and (reason := first.why_no_kernel(BLOCK)) is not None:
                rows.append({"name": name, "skipped": reason})
            else:
                calls = [call(keys, query_BHD, kernel) for keys in sketches]
                rows.append(timed(name, calls, device, repeats=args.repeats, moved=first.nbytes))
            progress.update()
    return show(args, device, dtype, rows)
