"""``attnpred eval reasoning``: options, run, table, and measures for the report."""

from __future__ import annotations

import argparse

from attention_predictor.eval.benchmarks.reasoning.benchmark import Reasoning, choose_tasks, sample_scores
from attention_predictor.eval.benchmarks.reasoning.kinds import Sampling
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.prompts import context_length
from attention_predictor.eval.harness.runner import Plan, run
from attention_predictor.eval.harness.scores import show_results
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
    return show_results(run(benchmark, plan), MEASURE)


MEASURE = Measure("Reasoning", "solved, %", sample_scores)
