"""Record a model's attention scores, as training data for a predictor.

The command records, for each of a document's last --steps tokens, the row of block scores and the true attention mass
of every block, for every full-attention layer and KV head. If a row of the data has continuations (a list of texts,
such as questions with their answers), the command records each of them directly after the document. One prefill serves
up to 16 continuations.

With --rows sparse, the default, the model decodes the recorded tokens (all but the first 64) with a sparse cache. The
rows then look as they do at inference: exact scores for attended blocks, estimates from the key sketch for the others.
With --rows full the model attends to everything in one pass, as in the published training.

Each .txt file gives --per-file documents, taken from places spread over it; a short file gives fewer, so that they do
not overlap. Each row of a .jsonl or .parquet file, or of a data set of the Hugging Face hub, gives one document. If it
is too long, its end is kept, because questions and answers stand there. The command skips documents that are already
recorded, so an interrupted run can be started again.

examples:
  attnpred record --data texts/ --out runs/histories
  attnpred record --model meta-llama/Llama-3.1-8B --dtype bfloat16 \\
      --data prompts.jsonl --max-tokens 32768 --budgets 512,1024 \\
      --out runs/llama
  attnpred record --data texts/ --block-size 32 --out runs/blocks-of-32
  attnpred record --data OWNER/NAME:test --documents 50 --out runs/books
  accelerate launch --num_processes 4 -m attention_predictor.cli record \\
      --data texts/ --out runs/histories
  torchrun --nproc_per_node 2 -m attention_predictor.cli record --tp \\
      --model meta-llama/Llama-3.1-70B --data texts/ --out runs/large
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import (
    add_device_map_argument,
    add_model_arguments,
    add_option,
    add_tp_argument,
    check_model_arguments,
    check_output,
    whole_numbers,
)
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.kinds import number, whole
from attention_predictor.predictor import PROMPT_ROWS
from attention_predictor.settings import add_setting, offload_config

ROWS = ("sparse", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_device_map_argument(parser)
    add = parser.add_argument
    what = ".txt, .jsonl or .parquet file, directory of such files, or data set of the hub as [owner/]name:split"
    add("--data", required=True, metavar="D", help=what)
    add("--field", default="text", metavar="F", help="name of the column that holds the text (default: %(default)s)")
    what = "record at most N documents (default: all); required for a data set of the hub"
    add_option(parser, "--documents", whole(1), None, what)
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the recording")
    add_option(parser, "--max-tokens", whole(), 8192, "longest document, in tokens")
    steps = whole(also=(f"--steps above {PROMPT_ROWS}", lambda value: value > PROMPT_ROWS))
    add_option(parser, "--steps", steps, 256, "number of last tokens of a document that are recorded")
    add(
        "--rows",
        choices=ROWS,
        default="sparse",
        help="record rows from sparse decoding or from full attention (default: %(default)s)",
    )
    add_setting(
        parser, "predictor", default="ema", says="predictor that selects the blocks while recording sparse rows"
    )
    add(
        "--budgets",
        default="256,512",
        metavar="N,N",
        help="budgets of sparse rows, in tokens; documents take them in turn (default: %(default)s)",
    )
    add_option(parser, "--per-file", whole(1), 4, "number of documents from each .txt file")
    share = number("a share from 0 to below 1", lambda value: 0 <= value < 1, "SHARE")
    what = "share of .txt files and rows held out for validation, chosen by a hash of their names"
    add_option(parser, "--validation", share, 0.1, what)
    for name in ("block_size", "sink", "recent"):
        add_setting(parser, name)
    add_tp_argument(parser, "documents")


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    check_output("--out", args.out, folder=True)
    budgets = whole_numbers("--budgets", args.budgets) if args.rows == "sparse" else [1 << 30]
    for budget in budgets:
        offload_config(args, budget=budget)
    least = args.steps + args.sink + args.recent
    if args.max_tokens <= least:
        raise ConfigError(f"--max-tokens {args.max_tokens}: expected more than --steps + sink + recent = {least}")
    if args.documents is None and not Path(args.data).exists():
        raise DataError(f"--data {args.data}: no such file or directory; for a data set of the hub give --documents")
