"""Score predictions again: no model, no data, just what was written.

DIR has a <task>.jsonl for each task, with pred, answers, all_classes and, for -e, length in each line: the official
form. Or it is what attnpred eval wrote, with all its policies and budgets.

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
    add("benchmark", choices=BENCHMARKS, help="whose predictions they are")
    add("directory", type=Path, metavar="DIR", help="of predictions, or of a run")
    add("-e", "--e", action="store_true", help="by length, as LongBench-E is scored")
    add("--json", action="store_true", help='print {"tasks": {task: score}, …}; {"variants": …} of a run')
