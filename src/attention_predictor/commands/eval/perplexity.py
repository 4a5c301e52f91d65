"""Perplexity under a budget: measure how well a policy predicts the end of long documents.

The command takes --context tokens of each document: the first ones of a .txt file (with --per-file from places spread
over it), the last ones of a row. The model prefills all but the last --tail tokens. It decodes the tail token by token
under each policy; every token is predicted, scored and then replaced by the document's own. The stock model does the
same with its whole cache. The table shows bits per token, and perplexity (2 to that power), over all tokens of a task;
lower is better. Documents that are too short are skipped.

--data may be repeated; each is a task of the table.

examples:
  attnpred eval perplexity --data "books=heldout/books__*.txt" \\
      --data "code=heldout/code__*.txt" --context 8192 --tail 256 \\
      --policies full,streaming,quest,predictor --budgets 256,512 \\
      --out runs/books
  attnpred eval perplexity --data gov_report.jsonl --context 32768 \\
      --model meta-llama/Llama-3.1-8B --out runs/gov
"""

from __future__ import annotations

import argparse

from attention_predictor.commands import run_options
from attention_predictor.commands.window_options import add_window_arguments, check_window


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add_window_arguments(parser, tail=256)


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    check_window(args.context, args.tail)
