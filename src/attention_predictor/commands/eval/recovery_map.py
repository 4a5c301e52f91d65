"""Recovery by layer and head: show where a policy finds the attention mass that matters, and where not.

The command takes --context tokens of each document. The model prefills all but the last --tail tokens and decodes these
one by one under the policy. At every --interval-th step it also computes the true attention. If a row of the data has
continuations, such as questions with their answers, it decodes these instead of the tail. Recovery is the share of the
true mass on the attended blocks. Relative recovery is its ratio to that of the best selection within the budget. A head
is a KV head here, because blocks are chosen for each KV head.

Every line of OUT/<variant>/<task>.jsonl has both as one list per layer. OUT/heatmap.png shows the relative recovery of
each variant. The first line of each file also has a map of some steps: the mass of each block, the blocks read and the
best blocks; attnpred report shows it. The default policy is predictor.

examples:
  attnpred eval recovery-map --data texts/ --context 8192 --tail 128 --limit 5 \\
      --policies streaming,quest-ahead,predictor --budgets 256,512 \\
      --out runs/map
  attnpred eval recovery-map --data questions.jsonl --rule predictor \\
      --rule "ahead: predictor,late_fetch=0" --out runs/q
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands import run_options
from attention_predictor.commands.window_options import add_window_arguments, check_window
from attention_predictor.errors import ConfigError
from attention_predictor.eval.display.heatmap import FILE, check_heatmap
from attention_predictor.kinds import whole
from attention_predictor.offload.config import AUTO


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add_window_arguments(parser, tail=128)
    add_option(parser, "--interval", whole(), 4, "steps between measurements")
    parser.add_argument("--no-plot", dest="plot", action="store_false", help=f"don't draw OUT/{FILE}")


def check(args: argparse.Namespace) -> None:
    if args.policies is None and not args.rule:
        args.policies = "predictor"  # the stock model has nothing to recover
    if args.prefetch == AUTO:
        args.prefetch = "thread"  # captured steps can't be watched
    run_options.check(args)
    check_window(args.context, args.tail)
    if not 1 <= args.interval <= args.tail:
        raise ConfigError(f"--interval {args.interval}: expected 1 to --tail {args.tail}")
    check_heatmap(args.plot)
