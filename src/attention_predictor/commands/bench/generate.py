"""Time model.generate against engine.generate, the library's own shorter loop.

The model is attached once, with default settings. Both loops continue the same prompt of random tokens greedily, in
turn, several times. The table shows, for each: milliseconds per token, median of --repeats, without the prompt and
without the first 8 tokens, in which steps are captured; the ratio to engine.generate; whether steps were captured, and
if not, why; whether both loops chose the same tokens.

examples:
  attnpred bench generate --shape llama-3.1-8b --context 32768
  attnpred bench generate --context 4096 --new-tokens 32 --json
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.kinds import whole

SKIPPED = 8  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(2), 32768, "prompt tokens")
    add_option(parser, "--new-tokens", whole(SKIPPED + 2), 128, "tokens of each answer")
    add_option(parser, "--repeats", whole(1), 3, "timed answers of each loop, after one warm-up answer")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
