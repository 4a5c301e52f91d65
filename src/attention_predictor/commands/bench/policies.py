"""Time decoding steps under every selection policy, in one process, relative to the first policy.

All policies get the same made-up context (see bench decode --synthetic), through the same calls as a real prompt. Other
settings have their defaults.

The table shows, for each policy: milliseconds per token, median and 95th percentile; the ratio of the median to the
first policy's; whether its steps were captured as a CUDA graph, and if not, why; and its time by stage.

examples:
  attnpred bench policies --shape llama-3.1-8b --context 32768
  attnpred bench policies --shape llama-3.1-8b --context 131072 --steps 20 \\
      --policies predictor,quest,h2o --out runs/policies.jsonl
  attnpred bench policies --shape tiny --context 2048 --device cpu --json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, check_output
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.commands.bench.policy_options import add_policies, check_policies
from attention_predictor.kinds import number, whole
from attention_predictor.settings import add_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add_option(parser, "--context", whole(), 32768, "tokens of prompt and decoded steps together")
    add_policies(parser)
    add_setting(parser, "host_kv")
    add_option(parser, "--steps", whole(1), 40, "timed steps; 5 steps before and 3 after them are not timed")
    positive = number("more than 0", lambda value: value > 0, "S")
    add_option(parser, "--seconds", positive, 20.0, "stop timing a policy after this many seconds, with fewer steps")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="F",
        help="append each result to this file as a JSON line; a later run measures only missing policies",
    )
    parser.set_defaults(synthetic=True)


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    check_policies(args.policies)
    check_output("--out", args.out)
