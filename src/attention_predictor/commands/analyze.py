"""Measure, by layer and head, how well a model's attention can be predicted, and show why.

The command takes --context tokens of each document. The model reads all but the last --tail tokens as the prompt, then
the tail, with full attention. If a row of the data has continuations, such as questions with their answers, these
replace the tail.

For each layer and head the command measures: query similarity, of the prompt's last --window queries and of the steps;
the share of the next step's attention on the blocks that the predictor chooses within --budget tokens; the same share
for the blocks of the last row; the pattern of the attention map; and the RoPE frequencies that carry this pattern.

OUT/attention/<data>.jsonl gets a line for each document as it is finished, so an interrupted run can be started again.
From these files the command makes OUT/heads.json (a row for each layer and head), OUT/correlation.json (query
similarity against recovery), OUT/heads.parquet with --parquet, and OUT/gallery.html, a page that needs no other file.

examples:
  attnpred analyze --data texts/ --context 8192 --limit 8 --out runs/analysis
  attnpred analyze --model Qwen/Qwen3-0.6B --data books=books/ \\
      --data asked=questions.jsonl --budget 256 --out runs/q
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from attention_predictor.arguments import add_model_arguments, add_option, check_model_arguments, check_output
from attention_predictor.errors import ConfigError
from attention_predictor.eval.display.plots import check_plot
from attention_predictor.kinds import whole
from attention_predictor.settings import add_setting, offload_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    what = "[NAME=]PLACE: .txt, .jsonl or .parquet file, directory or glob pattern, or data set of the hub; repeatable"
    add("--data", action="append", required=True, metavar="D", help=what)
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for the results; an unfinished run in it continues",
    )
    add_option(parser, "--context", whole(), 4096, "tokens taken of each document")
    steps = whole(also=("at least 2 steps, to compare", lambda value: value >= 2))
    add_option(parser, "--tail", steps, 128, "number of last tokens of a document that are measured")
    add_option(parser, "--tails", whole(1), 4, "most continuations per row")
    add_option(parser, "--per-file", whole(1), 1, "number of documents from each .txt file")
    add_option(parser, "--limit", whole(1), None, "use only the first N documents of each --data")
    queries = whole(also=("at least 2 queries, to make a pair", lambda value: value >= 2))
    add_option(parser, "--window", queries, 32, "number of last prompt queries whose similarity is measured")
    add_setting(parser, "budget", default=512, says="tokens that the predictor may choose for a step")
    add_setting(parser, "predictor", says="predictor: default, last, ema, mean or a directory")
    add("--parquet", action="store_true", help="also write OUT/heads.parquet; needs pyarrow")
    add(
        "--plot",
        type=Path,
        metavar="F",
        help="plot query similarity against recovery into this .png, .svg or .pdf file",
    )
    add("--retry-errors", action="store_true", help="run documents again that failed before")


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    check_output("--out", args.out, folder=True)
    check_plot(args.plot)
    offload_config(args)
    if args.parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--parquet needs pyarrow: pip install 'attention-predictor[train]'")
