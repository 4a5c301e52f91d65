"""The pocket model's own tasks: statements planted in text, and questions that only these answer.

The document alone is prefilled; each question and its answer are decoded token by token under the policy, which must
find the evidence by itself. An answer is right when greedy decoding would give every token of it. All questions about
a document are decoded as one batch: a line of the results is a document, with the answers found of those asked for.

Tasks: kv (numbers of keys), facts (where people live, what they work as), chain (variables defined by variables),
labels (few-shot labels), excerpt (which paragraph a quotation is from), copy (the rest of a sentence).

examples:
  attnpred eval synthetic --data texts/ --tasks kv,facts --questions 100 \\
      --policies full,streaming,quest,predictor --budgets 256,512 \\
      --out runs/synthetic
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option
from attention_predictor.commands import run_options
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.kinds import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="D", help="text to plant in: .txt file or directory of them")
    add("--tasks", default="kv,facts", metavar="T,T", help=f"of {', '.join(synthetic.TASKS)} (%(default)s)")
    add_option(parser, "--questions", whole(1), 100, "of each task, in whole documents")
    add_option(parser, "--per-document", whole(1), 20, "questions a document")
    add_option(parser, "--context", whole(1), 8192, "tokens of document and question")


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    synthetic.check_tasks(synthetic.parse_tasks(args.tasks))
