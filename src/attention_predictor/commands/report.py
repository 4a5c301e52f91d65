"""Tables and a page of runs: what attnpred eval left in its --out directories, side by side.

Rows are policies by budget, columns tasks and averages. The best policy of a column at each budget is bold, full
attention and the oracle, which knows the truth, apart. Behind a score stands its bootstrap interval (95 %, over
samples); differences to full attention are over samples that both have, and so are their intervals. Runs of one
benchmark with the same settings share a table; others get one each.

Writes report.md, report.tex and report.html, one page that needs no other file and no network: the tables, accuracy
against budget, hit rate and fetched bytes by budget and over steps; where there are such runs, grids of needles,
recovery by layer and head, and maps of the blocks that held the attention and those that were read.

examples:
  attnpred report runs/longbench --out report/
  attnpred report runs/needle runs/ruler runs/map --out report/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole

NAME = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="DIR", help="--out of an attnpred eval")
    add("--out", type=Path, default=Path(NAME), metavar="DIR", help="where the report goes (%(default)s/)")
    seed = whole(also=("0 or more", lambda value: value >= 0))
    add_option(parser, "--seed", seed, 0, "of the bootstrap")


def check(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out} is not a directory")
