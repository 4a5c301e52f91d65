"""Long generation: measure how far a policy's predictions differ from the stock model's, and where.

The first --context tokens of each document are the prompt. The stock model generates --new-tokens tokens greedily.
Every policy then decodes these same tokens, one by one; its prediction for each is compared with the stock model's. The
table shows the KL divergence of the next-token distribution in nats per token (0: same as the stock model), over all
positions and by quarter; the share of positions with the same most likely token; and the first position where that
token differs. Up to this position the policy's own greedy text would be the same.

--data may be repeated; each is a task of the table. OUT/references keeps the stock model's continuations, so policies
and budgets can be added later.

examples:
  attnpred eval continuation --data heldout/ --context 4096 \\
      --new-tokens 2048 --policies predictor,quest,streaming \\
      --budgets 512 --out runs/long
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands import run_options
from attention_predictor.commands.window_options import add_source_arguments
from attention_predictor.kinds import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add_source_arguments(parser)
    add_option(parser, "--context", whole(1), 4096, "prompt tokens taken of each document")
    add_option(parser, "--new-tokens", whole(1), 2048, "tokens generated after the prompt")


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
