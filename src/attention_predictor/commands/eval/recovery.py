"""Compare policies by answers found and attention mass recovered, when question and answer are decoded sparsely.

The model prefills a document with planted statements, then decodes each question and its answer token by token under
each policy. So the policy must find the evidence itself. An answer is right if greedy decoding would give all of its
tokens. Recovery is the share of the true attention mass on the attended blocks. Relative recovery is its ratio to that
of the best selection of the same size.

With --tail N the command asks no questions: it decodes the last N of --context tokens of each document and measures
recovery only. It takes the first tokens of a .txt file (with --per-file from places spread over it), the last tokens of
a row. The default is then --policies predictor, because the stock model has no recovery to measure.

examples:
  attnpred eval recovery --data texts/ --tasks kv,facts --questions 100 \\
      --budgets 256,512 --rule full --rule streaming --rule quest \\
      --rule predictor,late_fetch=0 --rule predictor --out runs/questions
  attnpred eval recovery --data texts/ \\
      --rule "paper: predictor,predictor=runs/paper,calibration=exact"
  attnpred eval recovery --data longbench/qasper.jsonl --tail 128 \\
      --documents 20 --rule predictor,late_fetch=0,skip_layers=0+1
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.commands import run_options
from attention_predictor.commands.eval.synthetic import add_tasks_argument
from attention_predictor.commands.window_options import check_window
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.harness.rules import check_names
from attention_predictor.kinds import whole

TAIL_INTERVAL = 4  # default steps between measurements with --tail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser, budgets="256,512", out_required=False)
    add = parser.add_argument
    what = (
        "text for the documents: .txt file or directory of .txt files; with --tail, any form that attnpred record takes"
    )
    add("--data", required=True, metavar="D", help=what)
    add_tasks_argument(parser)
    add_option(parser, "--questions", whole(1), 100, "number of questions in all, rounded up to whole documents")
    add_option(parser, "--per-document", whole(1), 20, "questions per document")
    add_option(parser, "--tail", whole(), None, "ask no questions; decode the last N tokens of each document")
    add_option(parser, "--documents", whole(1), 20, "with --tail: most documents")
    add_option(parser, "--per-file", whole(1), 1, "with --tail: number of documents from each .txt file")
    add_option(
        parser, "--context", whole(1), 8192, "tokens of a document with its question and answer, or with its tail"
    )
    what = f"measure recovery at every N-th step; 0: never, but with --tail at every {TAIL_INTERVAL}th"
    add_option(parser, "--recovery", whole(0), 0, what)


def check(args: argparse.Namespace) -> None:
    if args.tail is not None:
        if args.policies is None and not args.rule:
            args.policies = "predictor"  # the stock model has no recovery
        args.limit = args.limit or args.documents
    check_names(run_options.rules_of(args), "--rule: names must differ")
    run_options.check(args)
    if args.tail is None:
        synthetic.check_tasks(synthetic.parse_tasks(args.tasks))
    else:
        check_window(args.context, args.tail)
