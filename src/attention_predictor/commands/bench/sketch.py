"""Time the block scores of one query from the 2-bit key sketch: this library's kernel and torch operations.

Milliseconds and rate are device times from replayed CUDA graphs; the sketches are not in the GPU's L2 cache.
Parentheses show the time of a single call from Python.

examples:
  attnpred bench sketch --context 131072
  attnpred bench sketch --device cpu --context 8192 --json
"""

from __future__ import annotations

import argparse

from attention_predictor.commands.bench import part_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    part_options.add_options(parser, "batch", "heads", "kv-heads", "head-dim", "context")


check = part_options.check
