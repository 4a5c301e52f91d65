"""Compute the scores of saved predictions again, without model and data.

DIR is one of two things: a directory in the official form, with a <task>.jsonl for each task and pred, answers,
all_classes and (for -e) length in each line; or the --out directory of attnpred eval, with all its policies and
budgets.

examples:
  attnpred score longbench predictions/ --json
  attnpred score longbench runs/llama
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.eval.benchmarks.longbench.tasks import BENCHMARK

BENCHMARKS = (BENCHMARK,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS, help="benchmark of the predictions")
    add("directory", type=Path, metavar="DIR", help="directory of predictions or of a run")
    add("-e", "--e", action="store_true", help="score by length, as LongBench-E does")
    add(
        "--json",
        action="store_true",
        help='print one JSON object: {"tasks": {task: score}, …}, or {"variants": …} for a run',
    )
