"""Options of commands that prefill the beginning of a document and decode its tail."""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """``--data --per-file``."""
    what = "[NAME=]PLACE: .txt, .jsonl or .parquet file, directory or glob pattern, or data set of the hub; repeatable"
    parser.add_argument("--data", action="append", required=True, metavar="D", help=what)
    add_option(parser, "--per-file", whole(1), 1, "number of documents from each .txt file")


def add_window_arguments(parser: argparse.ArgumentParser, tail: int) -> None:
    """``--data --per-file --context --tail``.

    Args:
        tail: Default of ``--tail``.
    """
    add_source_arguments(parser)
    add_option(parser, "--context", whole(), 8192, "tokens taken of each document, the tail included")
    add_option(parser, "--tail", whole(), tail, "number of last tokens of a document that are decoded")


def check_window(context: int, tail: int) -> None:
    """Raise ``ConfigError`` unless 1 ≤ ``--tail`` < ``--context``."""
    if not 1 <= tail < context:
        raise ConfigError(f"--tail {tail}: expected 1 to below --context {context}")
