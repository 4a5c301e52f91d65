"""Time bringing scattered blocks from host memory to the pool, on a CPU to a buffer.

On a GPU: our kernel, which reads pinned memory itself, by lists of blocks that are on the device already; what it
replaces; and a plain copy of as many bytes in one piece by the copy engine, which is the bus at its best. On a CPU: our
kernel, indexing by torch, and a copy in one piece.

Of what can be captured in a CUDA graph, milliseconds and rate are the device's own; in parentheses what a single call
from Python takes.

examples:
  attnpred bench gather
  attnpred bench gather --blocks 2048 --json
"""

from __future__ import annotations

import argparse

from attention_predictor.commands.bench import part_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    part_options.add_options(parser, "batch", "kv-heads", "head-dim", "context", "blocks")


check = part_options.check
