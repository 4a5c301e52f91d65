"""Time one token's attention over the blocks of a pool.

The command compares this library's kernel, which also computes block scores; the torch operations that it replaces,
with scores; and, without scores, torch's scaled_dot_product_attention and (if installed) FlashInfer's paged decode over
the same keys and values. A page of FlashInfer holds all KV heads, so it has one list of blocks per sequence; this
library has one per KV head. The last row copies as many bytes on the device, to show its memory bandwidth.

Milliseconds and rate are device times from replayed CUDA graphs; the inputs are not in the GPU's L2 cache. Parentheses
show the time of a single call from Python.

examples:
  attnpred bench attention
  attnpred bench attention --batch 16 --json
"""

from __future__ import annotations

import argparse

from attention_predictor.commands.bench import part_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    part_options.add_options(parser, "batch", "heads", "kv-heads", "head-dim", "budget")


check = part_options.check
