"""Record attention-score histories of a model, to train a predictor on.

Of a document's last tokens (--steps) the rows of block scores and the true block mass are kept, for every
full-attention layer and KV head. Where a row of the data names continuations, a list of texts such as questions with
their answers, each is recorded right behind the document by itself; 16 of them together cost one prefill.

With --rows sparse, the default, all but the first 64 steps are decoded one by one with a sparse cache, so that the rows
are those a predictor sees at inference: exact where the step attended, estimated from the key sketch elsewhere. With
--rows full everything is attended, in one pass, as the published training does.

A .txt file gives --per-file documents from places spread over it, fewer where these would be the same tokens. A row of
a .jsonl or .parquet file, or of a data set of the hub, gives one, whose end is kept when it is too long: that is where
questions and answers stand. Documents already recorded are skipped, so an interrupted run goes on.

examples:
  attnpred record --data texts/ --out runs/histories
  attnpred record --model meta-llama/Llama-3.1-8B --dtype bfloat16 \\
      --data prompts.jsonl --max-tokens 32768 --budgets 512,1024 \\
      --out runs/llama
  attnpred record --data texts/ --block-size 32 --out runs/blocks-of-32
  attnpred record --data OWNER/NAME:test --documents 50 --out runs/books
  accelerate launch --num_processes 4 -m attention_predictor.cli record \\
      --data texts/ --out runs/histories
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_model_arguments, add_option, check_model_arguments, whole_numbers
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.kinds import number, whole
from attention_predictor.predictor import PROMPT_ROWS
from attention_predictor.settings import add_setting, offload_config

ROWS = ("sparse", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    what = ".txt, .jsonl or .parquet file, a directory of them, or a data set of the hub, [owner/]name:split"
    add("--data", required=True, metavar="D", help=what)
    add("--field", default="text", metavar="F", help="column of a row's text (%(default)s)")
    what = "record at most so many; needed for a data set of the hub"
    add_option(parser, "--documents", whole(1), None, what)
    add("--out", type=Path, required=True, metavar="DIR", help="directory of the recording")
    add_option(parser, "--max-tokens", whole(), 8192, "tokens of a document, at most")
    steps = whole(also=(f"--steps above {PROMPT_ROWS}", lambda value: value > PROMPT_ROWS))
    add_option(parser, "--steps", steps, 256, "last tokens of a document, which are recorded")
    add("--rows", choices=ROWS, default="sparse", help="what a predictor is shown (%(default)s)")
    add_setting(parser, "predictor", default="ema", says="predictor that selects the blocks of sparse rows")
    add("--budgets", default="256,512", metavar="N,N", help="budgets of sparse rows, in turn (%(default)s)")
    add_option(parser, "--per-file", whole(1), 4, "documents taken from a .txt file")
    share = number("a share from 0 to below 1", lambda value: 0 <= value < 1, "SHARE")
    what = "share of the .txt files and rows that is kept from training, chosen by a hash of their names"
    add_option(parser, "--validation", share, 0.1, what)
    for name in ("block_size", "sink", "recent"):
        add_setting(parser, name)


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    budgets = whole_numbers("--budgets", args.budgets) if args.rows == "sparse" else [1 << 30]
    for budget in budgets:
        offload_config(args, budget=budget)
    least = args.steps + args.sink + args.recent
    if args.max_tokens <= least:
        raise ConfigError(f"--max-tokens {args.max_tokens}: expected more than --steps + sink + recent = {least}")
    if args.documents is None and not Path(args.data).exists():
        raise DataError(
            f"--data {args.data}: no such file or directory; of a data set of the hub, say with --documents how much"
        )
