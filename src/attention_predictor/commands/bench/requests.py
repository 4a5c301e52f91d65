"""Time a series of requests, as a server has them: first token, further tokens, and growth of memory.

Each request is a plain model.generate with its own prompt and its own cache, which is freed before the next request.
Caches for --ways: ours, this library with default settings; device, the stock model with its cache on the device.

The table shows, for each request: seconds to the first token, milliseconds per further token, host memory held by the
engine and by the process. Below stand the ratios of the first, second and last request to the stock model's median.
--fresh also measures the first request in a new process, without warm-up; compiled kernels may be on disk.

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
from attention_predictor.eval.bench.cache_setups import names_in
from attention_predictor.kinds import whole

NAMES = {"ours": "ours, default settings", "device": "stock cache on the device"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(1), 8192, "prompt tokens of a request")
    add_option(parser, "--requests", whole(1), 20, "number of requests")
    add_option(parser, "--new-tokens", whole(1), 24, "tokens of each answer")
    add = parser.add_argument
    add("--ways", default=",".join(NAMES), metavar="W,W", help="caches to time, in order (default: %(default)s)")
    add("--fresh", action="store_true", help="also measure the first request of a new process, for each cache")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    names_in(args.ways, NAMES)
