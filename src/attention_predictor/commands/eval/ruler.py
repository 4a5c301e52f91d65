"""RULER: needles, variable tracking, counting of words, and questions, at any length (arXiv 2404.06654).

Samples are made here, by seed: prompt and longest answer together have the length asked for, in the model's own
tokens. Parameters, scores and the beginning of the answer at the end of each prompt are RULER's, words and noise are
ours. Essays for five of the niah tasks come from --haystack. Questions come from --squad (qa_1) and --hotpotqa (qa_2),
files with a line of JSON for each: question, answers, context; without them these tasks are left out.

--data runs samples that RULER has made, input and outputs in each line, from <task>.jsonl or a directory of such
files.

The score is the share of reference answers that the prediction contains; for questions, whether it contains any.

examples:
  attnpred eval ruler --haystack essays/ --lengths 4096,8192 --no-chat \\
      --samples 20 --policies full,quest,predictor --budgets 512,1024 \\
      --out runs/ruler
  attnpred eval ruler --data ruler/4096/niah_multikey_3.jsonl \\
      --model meta-llama/Llama-3.1-8B-Instruct --out runs/mk3
  attnpred eval ruler --tasks vt,fwe --lengths 131072 \\
      --model Qwen/Qwen2.5-7B-Instruct-1M --out runs/ruler-128k
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, whole_numbers
from attention_predictor.commands import run_options
from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.ruler.base import WORDINGS
from attention_predictor.eval.benchmarks.ruler.families import ALL, FAMILIES, choose_families
from attention_predictor.kinds import whole

LENGTHS, SAMPLES = "4096", 100
MAKING = ("lengths", "samples", "haystack", "squad", "hotpotqa", "wording")  # --data leaves nothing to do for them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add = parser.add_argument
    add("--tasks", default=ALL, metavar="T,T", help=f"all (%(default)s) or some of {', '.join(FAMILIES)}")
    add("--lengths", metavar="N,N", help=f"tokens of prompt and answer ({LENGTHS})")
    add_option(parser, "--samples", whole(1), None, f"of each task and length ({SAMPLES})")
    add("--haystack", type=Path, metavar="D", help="essays: .txt file or directory of them")
    add("--squad", type=Path, metavar="F", help="jsonl of questions, for qa_1")
    add("--hotpotqa", type=Path, metavar="F", help="jsonl of questions, for qa_2")
    what = f"{WORDINGS[0]} (default), or {WORDINGS[1]}: niah as the pocket model has learned to be asked"
    add("--wording", choices=WORDINGS, help=what)
    add("--data", type=Path, metavar="D", help="samples made by RULER: <task>.jsonl or directory of them")
    add("--no-chat", dest="chat", action="store_false", help="don't put prompts into the chat template")


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    choose_families(args.tasks)
    if args.lengths is not None:
        whole_numbers("--lengths", args.lengths)
    if args.data is not None and (given := [name for name in MAKING if getattr(args, name) is not None]):
        raise ConfigError(f"--{given[0]} is for samples made here, not for those of --data")
