r"""GSM8K, MATH and AIME: share of problems solved by a chain of thought, policies and budgets down.

DIR has a <task>.jsonl for each task, named gsm8k…, math… or aime…, in the forms these are published in: a problem
(problem, question or prompt) and its answer (answer, also behind GSM8K's ####; or a solution with a \boxed one). The
answer is found in what the model wrote, however it is formatted, and compared as a number or as LaTeX.

A model with a chat template is told to think step by step; another one sees four solved problems before its own.

examples:
  attnpred eval reasoning --data reasoning/ --tasks gsm8k_test --limit 100 --out runs/gsm8k \
      --model Qwen/Qwen2.5-7B-Instruct --policies full,snapkv,predictor --budgets 256,512
  attnpred eval reasoning --data reasoning/ --tasks aime24,aime25 --temperature 0.6 --top-p 0.95 --repeats 8 \
      --max-new-tokens 32768 --model deepseek-ai/DeepSeek-R1-Distill-Llama-8B --out runs/aime
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.eval.folder import RunFolder
from attention_predictor.eval.means import conclude, mean_scores, means_table
from attention_predictor.eval.prompts import context_length
from attention_predictor.eval.reasoning.benchmark import KINDS, Reasoning, Sampling, choose_tasks, sample_scores
from attention_predictor.eval.runner import Plan, add_run_arguments, run
from attention_predictor.loading import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="directory of <task>.jsonl")
    what = f"files of it, or all (%(default)s) named {', '.join(name + '…' for name in KINDS)}, but those for training"
    add("--tasks", default="all", metavar="T,T", help=what)
    add("--few-shot", action="store_true", help="solved problems in place of the chat template")
    own = ", ".join(f"{name} {one.max_new_tokens}" for name, one in KINDS.items())
    add("--max-new-tokens", type=int, metavar="N", help=f"longest chain of thought (default: {own})")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) decodes greedily")
    add("--top-p", type=float, default=1.0, metavar="P", help="with a temperature; default %(default)s")
    add("--repeats", type=int, default=1, metavar="N", help="with a temperature: so often each problem, for the mean")


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    sampling = Sampling(args.temperature, args.top_p, args.repeats)
    benchmark = Reasoning(
        load_tokenizer(args.model),
        args.data,
        choose_tasks(args.data, args.tasks),
        few_shot=args.few_shot,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        context=context_length(args.model),
    )
    return conclude(run(benchmark, plan), sample_scores, folder_table)


def folder_table(folder: RunFolder) -> str:
    """A run's accuracies in percent."""
    return means_table(folder, mean_scores(folder, sample_scores), "solved, %")
