"""Score predictions again: no model, no data, just what was written.

DIR has a <task>.jsonl for each task, with `pred`, `answers`, `all_classes` and, for -e, `length` in each line: the
official form. Or it is what attnpred eval wrote, with all its policies and budgets.

examples:
  attnpred score longbench predictions/ --json
  attnpred score longbench runs/llama
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attention_predictor.eval.folder import RunFolder
from attention_predictor.eval.longbench.scorer import score_directory, score_folder
from attention_predictor.eval.longbench.table import folder_table, scores_table
from attention_predictor.eval.longbench.tasks import BENCHMARK
from attention_predictor.predictor.errors import ConfigError

BENCHMARKS = (BENCHMARK,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=BENCHMARKS, help="whose predictions they are")
    parser.add_argument("directory", type=Path, metavar="DIR", help="of predictions, or of a run")
    parser.add_argument("-e", "--e", action="store_true", help="by length, as LongBench-E is scored")
    parser.add_argument(
        "--json", action="store_true", help='print {"tasks": {task: score}, …}; {"variants": …} of a run'
    )


def main(args: argparse.Namespace) -> int:
    folder = RunFolder(args.directory)
    if folder.description:
        if folder.description["benchmark"] != args.benchmark:
            found = folder.description["benchmark"]
            raise ConfigError(f"{args.directory} is a run of {found}, not of {args.benchmark}")
        of_variants = score_folder(folder, extended=args.e)
        printed = {"variants": {name: one.to_dict() for name, one in of_variants.items()}}
        table = folder_table(folder, of_variants)
    else:
        scores = score_directory(args.directory, extended=args.e)
        printed, table = scores.to_dict(), scores_table({args.directory.name: scores}, {})
    print(json.dumps(printed, ensure_ascii=False) if args.json else table)
    return 0
