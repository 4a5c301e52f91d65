"""Time the tokens of model.generate, as it comes, against those of engine.generate, the shortest loop there is.

The model is attached with default settings, once; both loops continue the same prompt of random tokens, greedily, one
after the other, several times. For each: milliseconds a token, the median of --repeats, without the prompt and the
first 8 tokens, in which steps are captured; the ratio to engine.generate; whether steps were captured, and why not;
whether both loops chose the same tokens.

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
    add_option(parser, "--context", whole(2), 32768, "tokens of the prompt")
    add_option(parser, "--new-tokens", whole(SKIPPED + 2), 128, "of each answer")
    add_option(parser, "--repeats", whole(1), 3, "answers of each loop, behind one more that warms up")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
