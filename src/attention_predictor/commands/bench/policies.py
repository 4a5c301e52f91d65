"""Time a decoding step under every selection policy, against that of the first one, in one process.

The context is made up (as by bench decode --synthetic), the same for all policies, which are told of it as a prompt
tells them. Each has default settings otherwise.

For each: milliseconds a token, median and 95th percentile; the ratio of the median to the first policy's; whether its
steps were captured as a CUDA graph, and why not; where their time goes.

examples:
  attnpred bench policies --shape llama-3.1-8b --context 32768
  attnpred bench policies --shape llama-3.1-8b --context 131072 --steps 20 \\
      --policies predictor,quest,h2o --out runs/policies.jsonl
  attnpred bench policies --shape tiny --context 2048 --device cpu --json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.commands.bench.policy_options import add_policies, check_policies
from attention_predictor.kinds import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(), 32768, "tokens of prompt and steps")
    add_policies(parser)
    add_option(parser, "--steps", whole(1), 40, "timed, between 5 and 3 more")
    positive = number("more than 0", lambda value: value > 0, "S")
    add_option(parser, "--seconds", positive, 20.0, "for the timed steps of a policy: then no more are taken")
    parser.add_argument("--out", type=Path, metavar="F", help="JSON lines; a further run does what is missing")
    parser.set_defaults(synthetic=True)


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    check_policies(args.policies)
