"""Time the tokens of attnpred eval perplexity under every policy: what an evaluation costs.

As in the evaluation, the model is attached once for each policy; of each sample the prompt is prefilled in full, and
every token of the tail is decoded and scored. Samples are random tokens. full is the stock model with its own cache.

The table shows, for each policy: milliseconds per token, as the mean over the tail with and without its first 8 tokens,
in which steps are captured; the ratio of the mean to the first policy's; milliseconds to attach and to prefill; whether
steps were captured, and if not, why. All are medians of --repeats samples.

examples:
  attnpred bench perplexity
  attnpred bench perplexity --context 4096 --budget 256 --json
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_model_arguments, add_option, check_model_arguments
from attention_predictor.commands.bench.policy_options import add_policies, check_policies, policies_of
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole
from attention_predictor.settings import add_setting, offload_config

SKIPPED = 8  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_option(parser, "--context", whole(), 4096, "tokens of a sample, the tail included")
    add_option(parser, "--tail", whole(SKIPPED + 3), 64, "number of last tokens of a sample that are decoded")
    add_setting(parser, "budget", default=512)
    add_policies(parser)
    add_option(parser, "--repeats", whole(1), 3, "timed samples of each policy, after one warm-up sample")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    check_policies(args.policies)
    if args.tail >= args.context:
        raise ConfigError(f"--tail {args.tail}: expected less than --context {args.context}")
    for policy in policies_of(args.policies):
        offload_config(args, policy=policy)
