"""Time requests one after another, as a server has them: first token, further tokens, and memory that stays or grows.

Each request is a plain model.generate of a prompt of its own with a cache of its own, which is gone before the next.
Ways: ours with default settings, and the stock model with its cache on the device.

For each request: seconds to the first token, milliseconds for each further one, host memory that the engine holds and
that the process has. Then ratios: the first request, the second and the last against the stock model's median. --fresh
takes the first request of each way in a process of its own, where nothing is warm (kernels may be on disk).

examples:
  attnpred bench requests --context 4096 --requests 5
  attnpred bench requests --shape llama-3.1-8b --context 32768 --requests 20
  attnpred bench requests --shape llama-3.1-8b --context 131072 \\
      --requests 3 --fresh
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole

NAMES = {"ours": "ours, default settings", "device": "stock cache on the device"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(1), 8192, "tokens of a prompt")
    add_option(parser, "--requests", whole(1), 20, "one after another")
    add_option(parser, "--new-tokens", whole(1), 24, "of each answer")
    add = parser.add_argument
    add("--ways", default=",".join(NAMES), metavar="W,W", help="who takes part (%(default)s)")
    add("--fresh", action="store_true", help="also the first request of a process, for each way")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    if unknown := sorted(set(args.ways.split(",")) - NAMES.keys()):
        raise ConfigError(f"--ways {unknown[0]}: expected some of {', '.join(NAMES)}")
