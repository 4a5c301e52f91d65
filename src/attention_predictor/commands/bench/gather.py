"""Time the transfer of scattered blocks from host memory to the pool.

On a GPU the command compares this library's kernel, which reads pinned host memory and takes its block lists from the
device; the transfer that it replaces; and one contiguous copy of as many bytes by the copy engine, the best rate of the
bus. On a CPU the target is a buffer, and it compares the kernel, torch indexing and a contiguous copy.

With --host-kv int8 or int4 blocks move as codes, which a GPU decodes on the way; rates count the bytes of codes.

Where a transfer can be captured in a CUDA graph, milliseconds and rate are device times. Parentheses show the time of a
single call from Python.

examples:
  attnpred bench gather
  attnpred bench gather --blocks 2048 --json
  attnpred bench gather --batch 32 --blocks 768 --host-kv int4
"""

from __future__ import annotations

import argparse

from attention_predictor.commands.bench import part_options
from attention_predictor.settings import add_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    part_options.add_options(parser, "batch", "kv-heads", "head-dim", "context", "blocks")
    add_setting(parser, "host_kv")
    parser.set_defaults(shown=[*parser.get_default("shown"), "host_kv"])


check = part_options.check
