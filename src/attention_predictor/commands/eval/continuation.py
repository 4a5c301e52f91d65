"""Long generation under a budget: how far a policy departs from the whole cache, and where.

Of each document the first --context tokens are the prompt. The stock model writes --new-tokens behind it, greedily, and
every policy follows that path: each token is predicted under the policy, compared with what the stock model says there,
and then given. Shown are the divergence of the next token's distribution (KL, nats a token; 0 is the stock model), over
all positions and by quarter of the path; the share of positions with the same most likely token; and the first position
with another one, up to which the policy's own greedy text is the same.

--data may be given several times; each is a task of the table. The stock model's continuations are kept in
OUT/references, so that more policies and budgets can be added.

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
    add_option(parser, "--context", whole(1), 4096, "tokens of each prompt")
    add_option(parser, "--new-tokens", whole(1), 2048, "tokens written behind it")


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
