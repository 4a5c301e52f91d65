"""The pocket model's own tasks: statements planted in text, and questions about them.

The model prefills the document, then decodes each question and its answer token by token under the policy. So the
policy must find the evidence itself. An answer is right if greedy decoding would give all of its tokens. All questions
about a document form one batch; a line of the results is one document, with the numbers of answers found and asked for.

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
    add(
        "--data",
        type=Path,
        required=True,
        metavar="D",
        help="text for the documents: .txt file, or directory of .txt files",
    )
    add_tasks_argument(parser)
    add_option(parser, "--questions", whole(1), 100, "questions of each task, rounded up to whole documents")
    add_option(parser, "--per-document", whole(1), 20, "questions per document")
    add_option(parser, "--context", whole(1), 8192, "tokens of a document with its question and answer")


def add_tasks_argument(parser: argparse.ArgumentParser) -> None:
    """``--tasks``."""
    what = f"tasks to run: {', '.join(synthetic.TASKS)} (default: %(default)s)"
    parser.add_argument("--tasks", default="kv,facts", metavar="T,T", help=what)


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    synthetic.check_tasks(synthetic.parse_tasks(args.tasks))
