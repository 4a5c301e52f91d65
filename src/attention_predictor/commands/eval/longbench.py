"""LongBench: a table of scores, with a row for each policy and budget and a column for each task.

Prompts, answer lengths and scores are the official ones. A prompt that is too long loses its middle; --max-length sets
the limit (the authors use 7500 for a model of 8K tokens). Prompts use the model's chat template, except those of trec,
triviaqa, samsum, lsht, lcc and repobench-p. Use --no-chat for models that are not assistants. Each policy prefills the
whole prompt and decodes the answer with its budget.

A sample that fails is saved with its error, scores 0 and is counted below the table. Run the command again to continue
an interrupted run.

Three Chinese tasks need jieba for their scores: pip install 'attention-predictor[eval]'. Without it, --tasks all leaves
them out.

examples:
  attnpred eval longbench --data longbench/ --no-chat --tasks qasper,trec \\
      --out runs/pocket
  attnpred eval longbench --model meta-llama/Llama-3.1-8B-Instruct --data hub \\
      --policies full,streaming,snapkv,quest,predictor --budgets 512,1024,2048 \\
      --out runs/llama
  attnpred eval longbench --data longbench/ --no-chat --out runs/ahead \\
      --policies full --rule "ahead: predictor,late_fetch=0" \\
      --rule "late: predictor" --budgets 256,512 --limit 20
  accelerate launch --num_processes 4 -m attention_predictor.cli \\
      eval longbench --data hub --e --out runs/e
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option
from attention_predictor.commands import run_options
from attention_predictor.eval.benchmarks.longbench.tasks import ALL, TASKS, check_scorers, choose_tasks
from attention_predictor.kinds import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add = parser.add_argument
    what = "directory of <task>.jsonl files (with --e <task>_e.jsonl), hub (the authors' archive) or hub:OWNER/NAME"
    add("--data", required=True, metavar="D", help=what)
    add("--tasks", default=ALL, metavar="T,T", help=f"all, or some of {', '.join(TASKS)} (default: %(default)s)")
    add("--e", action="store_true", help="run LongBench-E: 13 English tasks, scored by length")
    add("--no-chat", dest="chat", action="store_false", help="don't use the model's chat template")
    what = "longest prompt, in tokens (default: the model's number of positions minus the answer's length)"
    add_option(parser, "--max-length", whole(), None, what)
    add(
        "--templates",
        type=Path,
        metavar="F",
        help="JSON file of prompt templates by task, instead of the official ones",
    )
    what = "also measure perplexity of the reference answers, which tells small models apart better than scores"
    add("--answer-perplexity", action="store_true", help=what)


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    tasks = choose_tasks(args.tasks, extended=args.e)
    if args.tasks != ALL:
        check_scorers(tasks)
