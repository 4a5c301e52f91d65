"""Run several benchmarks one after another, in one process that loads the model once.

Write each benchmark as after attnpred eval, with its options, and put the word "then" between two benchmarks. Each
needs its own --out, and continues an interrupted run there. The command checks options and data of all before it
starts the first, and prints the minutes that each one took.

examples:
  attnpred eval several needle --data texts/ --no-chat --out runs/needle \\
      then perplexity --data texts/ --out runs/perplexity
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from attention_predictor.commands import EVAL, add_commands
from attention_predictor.errors import AttentionPredictorError, ConfigError
from attention_predictor.parser import Parser

THEN = "then"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a benchmark with its options, the word then, the next benchmark, …"
    parser.add_argument("given", nargs=argparse.REMAINDER, metavar="BENCHMARK …", help=what)


def check(args: argparse.Namespace) -> None:
    """Reads what is given into ``args.benchmarks``, and refuses what each of them refuses."""
    parser = Parser(prog="attnpred eval")
    add_commands(parser, {name: one for name, one in EVAL.items() if name != "several"}, ("eval",))
    args.benchmarks = []
    for words in split(args.given):
        one = parser.parse_args(words)
        with naming(one):
            one.check(one)
        args.benchmarks.append(one)
    if without := [one.subcommand for one in args.benchmarks if one.out is None]:
        raise ConfigError(f"{without[0]} has no --out: each benchmark needs its own")
    outs = [one.out.resolve() for one in args.benchmarks]
    for out in outs:
        if outs.count(out) > 1:
            raise ConfigError(f"--out {out} is given twice: each benchmark needs its own")
        if inside := [other for other in outs if out in other.parents]:
            raise ConfigError(f"--out {inside[0]} is inside of another benchmark's, {out}: each needs its own")


@contextmanager
def naming(one: argparse.Namespace) -> Iterator[None]:
    """Errors of a benchmark say which one."""
    try:
        yield
    except AttentionPredictorError as error:
        raise ConfigError(f"{one.subcommand}, {one.out}: {error}") from error


def split(words: list[str]) -> list[list[str]]:
    """The words of each benchmark; ``ConfigError`` where there are none."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            parts.append([])
        else:
            parts[-1].append(word)
    if not all(parts):
        raise ConfigError(f"expected a benchmark with its options before and behind every {THEN!r}")
    return parts
