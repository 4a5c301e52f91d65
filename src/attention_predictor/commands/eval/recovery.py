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
      --rule predictor,late_fetch=0 --rule predictor --out table.json
  attnpred eval recovery --data texts/ \\
      --rule "paper: predictor,predictor=runs/paper,calibration=exact"
  attnpred eval recovery --data longbench/qasper.jsonl --tail 128 \\
      --documents 20 --rule predictor,late_fetch=0,skip_layers=0+1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_model_arguments, add_option, check_model_arguments, whole_numbers
from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.harness.rules import Rule, check_names
from attention_predictor.kinds import whole

TAIL_INTERVAL = 4  # steps between measurements of recovery where nothing else is judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
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
    add("--budgets", default="256,512", metavar="N,N", help="tokens a step reads (%(default)s)")
    add("--rule", action="append", metavar="RULE", help="[name:] policy[,field=value…]; default: full and predictor")
    what = f"measure it at every N-th step; 0: never, with --tail at every {TAIL_INTERVAL}th"
    add_option(parser, "--recovery", whole(0), 0, what)
    what = "JSON of all cells, written after each; those done by the same rule are kept"
    add("--out", type=Path, metavar="F", help=what)


def rules_of(args: argparse.Namespace) -> list[Rule]:
    """What ``--rule`` asks for."""
    return [Rule.parse(text) for text in args.rule or (["full", "predictor"] if args.tail is None else ["predictor"])]


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    rules = rules_of(args)
    check_names(rules, "--rule: names must differ")
    for rule in rules:
        for budget in whole_numbers("--budgets", args.budgets):
            rule.config(budget)
    if args.tail is None:
        synthetic.check_tasks(args.tasks.split(","))
    elif not 1 <= args.tail < args.context:
        raise ConfigError(f"--tail {args.tail}: expected 1 to below --context {args.context}")
