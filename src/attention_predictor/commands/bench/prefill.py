"""Time the prefill of a long prompt, with keys and values moving to host memory and with stock caches.

The prompt goes through the model in chunks of --chunk tokens; every chunk after the first attends to all cached tokens.
Caches for --ways: ours, this library with default settings; bare, this library without sketch and history (policy
streaming), to show what those cost; device, transformers' DynamicCache on the device; offloaded, the same offloaded
layer by layer (GPU only).

The table shows, for each cache: seconds, as the median of --repeats and for the first prefill, which also allocates
host memory; the ratio to the stock cache on the device; peak device memory beyond the weights; bytes moved between host
and device, counted for this library and computed for the offloaded cache. A cache that does not fit in memory is
skipped with a note that says why. Each cache's result goes to standard error as soon as it is known.

examples:
  attnpred bench prefill --context 8192 --chunk 2048
  attnpred bench prefill --shape llama-3.1-8b --context 131072 --chunk 16384 \\
      --json
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.eval.bench.cache_setups import PREFILL_SETUPS, names_in
from attention_predictor.kinds import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(1), 8192, "prompt tokens")
    add_option(parser, "--chunk", whole(1), None, "tokens per chunk (default: the whole prompt)")
    what = "caches to time, in order (default: all that the device can run)"
    parser.add_argument("--ways", metavar="W,W", help=what)
    add_option(parser, "--repeats", whole(1), 3, "timed prefills, after the first one")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    if args.ways is not None:
        names_in(args.ways, PREFILL_SETUPS)
