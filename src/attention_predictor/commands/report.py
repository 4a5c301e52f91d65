"""Make tables and an HTML page from the --out directories of attnpred eval.

Rows are policies by budget; columns are tasks and averages. Bold marks the best policy of a column at each budget,
without full attention and without the oracle, which knows the true attention. Each score has a 95% bootstrap interval
over samples. Differences to full attention, and their intervals, use the samples that both runs have. Runs of one
benchmark with the same settings share a table; other runs get their own.

The command writes report.md, report.tex and report.html. The page needs no other file and no network. It shows the
tables, scores against budget, and hit rate and fetched bytes by budget and by step; for runs that have them also needle
grids, recovery by layer and head, and maps of the blocks that held the attention and of those that were read.

examples:
  attnpred report runs/longbench --out report/
  attnpred report runs/needle runs/ruler runs/map --out report/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, check_output
from attention_predictor.kinds import whole

NAME = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="DIR", help="--out directory of an attnpred eval")
    add("--out", type=Path, default=Path(NAME), metavar="DIR", help="directory for the report (default: %(default)s/)")
    seed = whole(also=("0 or more", lambda value: value >= 0))
    add_option(parser, "--seed", seed, 0, "random seed of the bootstrap")


def check(args: argparse.Namespace) -> None:
    check_output("--out", args.out, folder=True)
