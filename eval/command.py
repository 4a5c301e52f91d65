"""Judge a model under selection policies: one subcommand for each benchmark."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = {"recovery": ("attention_predictor.eval.recovery", "answers found and attention mass recovered")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module, line) in BENCHMARKS.items():
        implementation = importlib.import_module(module)
        command = benchmarks.add_parser(
            name,
            help=line,
            description=implementation.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        implementation.add_arguments(command)
        command.set_defaults(benchmark_main=implementation.main)


def main(args: argparse.Namespace) -> int:
    return args.benchmark_main(args)
