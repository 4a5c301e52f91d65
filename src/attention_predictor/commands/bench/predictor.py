"""Time one step of a predictor in one layer: observe a score row, then score all blocks for the next token.

The command times the default predictor with its kernels, if they can be built, and with torch operations; the published
network (arch paper) in its streamed form, with kernels and with torch operations; and the published network over its
whole window, for each KV head as in this library and for each query head as published. Rows are random, and so are the
weights of the published network; neither affects the time.

Milliseconds are device times from replayed CUDA graphs. Parentheses show the time of a single call from Python. Times
of a whole token are for --layers layers.

examples:
  attnpred bench predictor
  attnpred bench predictor --tokens 2048,32768 --device cpu --repeats 5
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option, whole_numbers
from attention_predictor.commands.bench import part_options
from attention_predictor.kinds import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    part_options.add_options(parser, "batch", "heads", "kv-heads")
    contexts = "2048,8192,32768,131072,524288,1048576"
    parser.add_argument(
        "--tokens", default=contexts, metavar="N,N", help="context lengths, in tokens (default: %(default)s)"
    )
    add_option(parser, "--layers", whole(1), 32, "layers of the model, for the time of a whole token")
    positive = number("more than 0", lambda value: value > 0, "S")
    what = "longest time of a measurement, in seconds; a slow one gets fewer repeats"
    add_option(parser, "--seconds", positive, 10.0, what)


def check(args: argparse.Namespace) -> None:
    part_options.check(args)
    whole_numbers("--tokens", args.tokens)
