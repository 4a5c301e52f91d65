"""Time what a query makes of every block of the context, by the 2-bit keys: our kernel, and the torch operations.

Milliseconds and rate are the device's own, from replayed CUDA graphs over sketches that are not in its cache; in
parentheses what a single call from Python takes.

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
