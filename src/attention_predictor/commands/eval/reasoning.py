r"""GSM8K, MATH and AIME: measure the share of problems that a model solves with a chain of thought.

The --data directory has a <task>.jsonl for each task, with a name that starts with gsm8k, math or aime. The published
forms work: each line has a problem (field problem, question or prompt) and its answer (field answer, which may end in
GSM8K's #### number, or field solution with a \boxed answer). The command extracts the answer from the generated text
and compares it as a number or as LaTeX.

A model with a chat template is asked to think step by step. Other models see four solved problems before each problem.

examples:
  attnpred eval reasoning --data reasoning/ --tasks gsm8k_test --limit 100 \
      --model Qwen/Qwen2.5-7B-Instruct --policies full,snapkv,predictor \
      --budgets 256,512 --out runs/gsm8k
  attnpred eval reasoning --data reasoning/ --tasks aime24,aime25 \
      --temperature 0.6 --top-p 0.95 --repeats 8 --max-new-tokens 32768 \
      --model deepseek-ai/DeepSeek-R1-Distill-Llama-8B --out runs/aime
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option
from attention_predictor.commands import run_options
from attention_predictor.eval.benchmarks.reasoning.kinds import KINDS, Sampling
from attention_predictor.kinds import number, temperature, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="directory of <task>.jsonl files")
    what = f"tasks to run; all: every file named {', '.join(name + '…' for name in KINDS)} except training sets"
    what += " (default: %(default)s)"
    add("--tasks", default="all", metavar="T,T", help=what)
    add("--few-shot", action="store_true", help="show solved problems instead of using the chat template")
    own = ", ".join(f"{name} {one.max_new_tokens}" for name, one in KINDS.items())
    add_option(
        parser,
        "--max-new-tokens",
        whole(1),
        None,
        f"longest answer, chain of thought included, in tokens (default: {own})",
    )
    add_option(parser, "--temperature", temperature(), 0.0, "sampling temperature; 0: greedy")
    share = number("a share above 0, up to 1", lambda value: 0 < value <= 1, "P")
    add_option(
        parser,
        "--top-p",
        share,
        1.0,
        "with --temperature: sample from the most likely tokens with this total probability",
    )
    what = "with --temperature: answer each problem N times and take the mean"
    add_option(parser, "--repeats", whole(1), 1, what)


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    Sampling(args.temperature, args.top_p, args.repeats)
