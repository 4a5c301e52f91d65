"""Time requests of mixed lengths side by side, as a server has them (engine.stream).

Prompts are random tokens, their lengths spread evenly by their logarithm. All numbers of places get the same requests.
1 place is one request after another: what sharing steps is compared with.

The table shows, for each number of places: seconds in all, new tokens per second, prefills included; the median of
seconds to the first token, and the largest; peak device memory.

examples:
  attnpred bench stream --requests 8 --lengths 300,2000 --new-tokens 32
  attnpred bench stream --shape llama-3.1-8b --requests 32 \\
      --lengths 1024,32768 --new-tokens 256 --places 1,8,16
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option, whole_numbers
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole
from attention_predictor.settings import add_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser, batch=False)
    add = parser.add_argument
    add_option(parser, "--requests", whole(1), 16, "number of requests")
    add("--lengths", default="1024,8192", metavar="MIN,MAX", help="tokens of a prompt (default: %(default)s)")
    add_option(parser, "--new-tokens", whole(2), 64, "tokens of each answer")
    add("--places", default="1,8", metavar="N,N", help="requests in progress at once (default: %(default)s)")
    add_setting(parser, "host_kv")
    add_setting(parser, "late_fetch")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    whole_numbers("--places", args.places)
    lengths = whole_numbers("--lengths", args.lengths)
    if len(lengths) != 2 or lengths[0] > lengths[1]:
        raise ConfigError(f"--lengths {args.lengths}: expected the shortest and the longest, such as 1024,8192")
