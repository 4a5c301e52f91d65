"""Judge a model under selection policies: one subcommand for each benchmark."""

from __future__ import annotations

import argparse

from attention_predictor.eval.subcommands import add_subcommands, run_subcommand

BENCHMARKS = {
    "longbench": ("attention_predictor.eval.longbench.command", "LongBench and LongBench-E: a table of scores"),
    "needle": ("attention_predictor.eval.needle", "needle in a haystack: found or not, by depth and length"),
    "ruler": ("attention_predictor.eval.ruler.command", "RULER's families of tasks, at any length"),
    "reasoning": ("attention_predictor.eval.reasoning.command", "GSM8K, MATH, AIME: problems solved step by step"),
    "perplexity": ("attention_predictor.eval.perplexity", "how well the rest of long documents is predicted"),
    "synthetic": ("attention_predictor.eval.planted", "the pocket model's own tasks: answers found in long documents"),
    "recovery": ("attention_predictor.eval.recovery", "answers found and attention mass recovered"),
    "recovery-map": ("attention_predictor.eval.recovery_map", "attention mass recovered, by layer and head"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, BENCHMARKS)


main = run_subcommand
