"""Perplexity under a budget: how well the rest of a long document is predicted when it is decoded sparsely.

Of each document --context tokens are taken (of a .txt file the first ones, or with --per-file from places spread over
it; of a row the last ones). All but the last --tail of these are prefilled; the others are decoded one by one, each
predicted under the policy and then given, whatever was predicted. The stock model does the same with its whole cache.
Less is better: bits a token, and perplexity, 2 to their power, over all tokens of a task. Documents that are too
short are left out.

--data may be given several times; each is a task of the table.

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
    check_window(args)
