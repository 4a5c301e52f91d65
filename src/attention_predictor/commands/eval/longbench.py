"""LongBench: a table of scores, policies and budgets down, tasks across.

Prompts, lengths and scores are the official ones. A prompt that is too long loses its middle; --max-length 7500, say,
cuts where the authors cut for a model of 8K tokens. Prompts are put into the model's chat template, but for trec,
triviaqa, samsum, lsht, lcc and repobench-p; --no-chat puts none into it, for models that are no assistants. Each
policy sees the prompt in full and decodes the answer with its budget.

A sample that fails is kept with its error, scores 0 and is counted below the table. Run the command again, and it goes
on where it stopped.

Three Chinese tasks are scored with jieba: pip install 'attention-predictor[eval]'. Without it they are left out, unless
they are asked for by name.

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
    what = (
        "directory of <task>.jsonl (<task>_e.jsonl with --e), hub (the authors' archive), or hub:owner/name, a mirror"
    )
    add("--data", required=True, metavar="D", help=what)
    add("--tasks", default=ALL, metavar="T,T", help=f"all (%(default)s) or some of {', '.join(TASKS)}")
    add("--e", action="store_true", help="LongBench-E: 13 English tasks, scored by length")
    add("--no-chat", dest="chat", action="store_false", help="don't put prompts into the chat template")
    what = "cut longer prompts in the middle (default: what the model has positions for, less the answer's)"
    add_option(parser, "--max-length", whole(), None, what)
    add("--templates", type=Path, metavar="F", help="JSON of templates by task, in place of the official ones")
    what = "also the perplexity of the reference answers: it tells small models apart where scores don't"
    add("--answer-perplexity", action="store_true", help=what)


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    tasks = choose_tasks(args.tasks, extended=args.e)
    if args.tasks != ALL:
        check_scorers(tasks)
