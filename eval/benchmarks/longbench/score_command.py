"""``attnpred score``: scores of predictions that are there already."""

from __future__ import annotations

import argparse
import json

from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.longbench.scorer import score_directory, score_folder
from attention_predictor.eval.benchmarks.longbench.table import folder_table, scores_table
from attention_predictor.eval.harness.run_folder import RunFolder


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
