"""Time one step of a predictor in one layer: a row observed, all candidates scored for the next token.

The default predictor by its kernels, where there are some, and by torch operations; the published network streamed, by
kernels and by torch operations, and over its whole window, for each KV head as here and for each query head as
published. Rows and weights don't matter for time: rows are random, and so are the published network's weights.

Milliseconds are the device's own, from replayed CUDA graphs; in parentheses what a single call from Python takes. Those
of a token are for --layers layers.

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
    parser.add_argument("--tokens", default=contexts, metavar="N,N", help="contexts (%(default)s)")
    add_option(parser, "--layers", whole(1), 32, "of a whole token")
    positive = number("more than 0", lambda value: value > 0, "S")
    what = "for each of the two measurements of a way; fewer repeats rather than more time"
    add_option(parser, "--seconds", positive, 10.0, what)


def check(args: argparse.Namespace) -> None:
    part_options.check(args)
    whole_numbers("--tokens", args.tokens)
