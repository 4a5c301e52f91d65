"""Time one token's attention over the blocks of a pool.

Our kernel, which also gives block scores; the torch operations it replaces, with scores; and without scores torch's
scaled_dot_product_attention and, where it is installed, FlashInfer's paged decode over the same keys and values. (Its
pages hold all KV heads: one list of blocks for a sequence, where ours has one for each KV head.) At the end, for the
memory's rate, a copy of as many bytes on the device, read and written.

Milliseconds and rate are the device's own, from replayed CUDA graphs over inputs that are not in its cache; in
parentheses what a single call from Python takes.

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
