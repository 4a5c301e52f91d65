"""Judge selection rules: answers found, and attention mass recovered, when question and answer are decoded sparsely.

The document is prefilled; the question and its answer are then decoded token by token under each rule, so that the
model must find its own evidence. Answers are right when greedy decoding would give every token of them. Recovery is the
share of true attention mass on the attended blocks, relative recovery its ratio to the best selection of that size.

With --tail N nothing is asked: of each document --context tokens are taken (of a .txt file the first ones, or with
--per-file from places spread over it; of a row the last ones), the last N of these are decoded, and recovery alone is
judged.

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
from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.harness.rules import check_names
from attention_predictor.kinds import whole

TAIL_INTERVAL = 4  # default steps between measurements with --tail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser, budgets="256,512", out_required=False)
    add = parser.add_argument
    what = "text to plant in: .txt file or directory; with --tail, what attnpred record takes"
    add("--data", required=True, metavar="D", help=what)
    add("--tasks", default="kv,facts", metavar="T,T", help=f"of {', '.join(synthetic.TASKS)} (%(default)s)")
    add_option(parser, "--questions", whole(1), 100, "in all, rounded up to whole documents")
    add_option(parser, "--per-document", whole(1), 20, "questions a document")
    add_option(parser, "--tail", whole(), None, "ask nothing, decode the last N tokens taken of each document")
    add_option(parser, "--documents", whole(1), 20, "with --tail: at most so many")
    add_option(parser, "--per-file", whole(1), 1, "with --tail: documents of a .txt file")
    add_option(parser, "--context", whole(1), 8192, "tokens of document and question or tail")
    what = f"measure it at every N-th step; 0: never, with --tail at every {TAIL_INTERVAL}th"
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
    elif not 1 <= args.tail < args.context:
        raise ConfigError(f"--tail {args.tail}: expected 1 to below --context {args.context}")
