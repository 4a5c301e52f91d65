"""Time the prefill of a long prompt, with keys and values leaving for host memory and with stock caches, side by side.

The prompt goes through the model in chunks of --chunk tokens; every chunk after the first attends to what is cached.
Ways: ours; ours without sketch and history (policy streaming), which tells what they cost; transformers' DynamicCache
on the device; on a GPU the same offloaded layer by layer.

For each: seconds, the median of --repeats, and of the first time, which also allocates host memory; the ratio to the
stock cache on the device; the largest device memory on top of the weights; bytes moved between host and device, counted
for ours, computed for the offloaded cache. What does not fit in memory is skipped, and it is said why. While it runs,
each way's figures go to standard error as soon as they are known.

examples:
  attnpred bench prefill --context 8192 --chunk 2048
  attnpred bench prefill --shape llama-3.1-8b --context 131072 --chunk 16384 \\
      --json
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.cache_setups import PREFILL_SETUPS
from attention_predictor.kinds import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(1), 8192, "tokens of the prompt")
    add_option(parser, "--chunk", whole(1), None, "tokens that go through the model at once (default: all)")
    what = "who takes part, and in what order (%(default)s)"
    parser.add_argument("--ways", default=",".join(PREFILL_SETUPS), metavar="W,W", help=what)
    add_option(parser, "--repeats", whole(1), 3, "timed, after one more")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    if unknown := sorted({name.strip() for name in args.ways.split(",")} - PREFILL_SETUPS.keys()):
        raise ConfigError(f"--ways {', '.join(unknown)}: expected some of {', '.join(PREFILL_SETUPS)}")
