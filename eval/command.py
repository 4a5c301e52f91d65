"""Judge a model under selection policies: one subcommand for each benchmark."""

from __future__ import annotations

import argparse

from attention_predictor.eval.subcommands import add_subcommands, run_subcommand

BENCHMARKS = {
    "longbench": ("attention_predictor.eval.longbench.command", "LongBench and LongBench-E: a table of scores"),
    "recovery": ("attention_predictor.eval.recovery", "answers found and attention mass recovered"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, BENCHMARKS)


main = run_subcommand
