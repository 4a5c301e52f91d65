"""Show where a model's attention can be foreseen, by layer and head, and why.

Of each document --context tokens are taken. All but the last --tail go through the model as the prompt, then those,
with attention to everything; rows with continuations, questions with their answers for example, are followed by these.
Measured for each layer and head: query similarity (of the prompt's last --window queries, and of the steps), how much
of the next step's attention the predictor finds ahead of it within --budget tokens, and how much the last row
repeated, the pattern that the attention map shows, and the RoPE frequencies that carry it.

OUT/attention/<data>.jsonl has a line a document, written as it goes: an unfinished run goes on. From all of them are
made OUT/heads.json (a row a layer and head), OUT/correlation.json (query similarity against recovery),
OUT/heads.parquet with --parquet, and OUT/gallery.html, a page that needs nothing else.

examples:
  attnpred analyze --data texts/ --context 8192 --limit 8 --out runs/analysis
  attnpred analyze --model Qwen/Qwen3-0.6B --data books=books/ \\
      --data asked=questions.jsonl --budget 256 --out runs/q
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from attention_predictor.arguments import add_model_arguments, add_option, check_model_arguments
from attention_predictor.errors import ConfigError
from attention_predictor.eval.display.plots import check_plot
from attention_predictor.kinds import whole
from attention_predictor.settings import add_setting, offload_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    what = "[name=]place: .txt, .jsonl or .parquet, a directory or pattern of them, or a data set of the hub"
    add("--data", action="append", required=True, metavar="D", help=what)
    add("--out", type=Path, required=True, metavar="DIR", help="results; an unfinished run in it goes on")
    add_option(parser, "--context", whole(), 4096, "tokens of each document")
    steps = whole(also=("at least 2 steps, to compare", lambda value: value >= 2))
    add_option(parser, "--tail", steps, 128, "last tokens of a document: the steps that are judged")
    add_option(parser, "--tails", whole(1), 4, "continuations taken of a row, at most")
    add_option(parser, "--per-file", whole(1), 1, "documents taken from a .txt file")
    add_option(parser, "--limit", whole(1), None, "the first N documents of each --data alone")
    queries = whole(also=("at least 2 queries, to make a pair", lambda value: value >= 2))
    add_option(parser, "--window", queries, 32, "queries that are compared with each other")
    add_setting(parser, "budget", default=512, says="tokens that may be chosen for a step")
    add_setting(parser, "predictor", says="predictor that chooses: a name or a directory")
    add("--parquet", action="store_true", help="write heads.parquet too (needs pyarrow)")
    add("--plot", type=Path, metavar="F", help="query similarity against recovery (.png, .svg, .pdf)")
    add("--retry-errors", action="store_true", help="try documents once more that failed")


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    check_plot(args.plot)
    offload_config(args)
    if args.parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--parquet needs pyarrow: pip install 'attention-predictor[train]'")
