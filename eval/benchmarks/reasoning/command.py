"""``attnpred eval reasoning``: what its options ask for, run and shown as a table."""

from __future__ import annotations

import argparse

from attention_predictor.eval.benchmarks.reasoning.benchmark import Reasoning, choose_tasks, sample_scores
from attention_predictor.eval.benchmarks.reasoning.kinds import Sampling
from attention_predictor.eval.harness.prompts import context_length
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, run
from attention_predictor.eval.harness.scores import conclude, mean_scores, means_table
from attention_predictor.loading import load_tokenizer


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
