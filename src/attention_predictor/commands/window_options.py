"""Options of commands that take parts of documents: a prompt, and the tail that is decoded behind it."""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """``--data --per-file``."""
    what = "[name=]place: .txt, .jsonl or .parquet, a directory or pattern of them, or a data set of the hub"
    parser.add_argument("--data", action="append", required=True, metavar="D", help=what)
    add_option(parser, "--per-file", whole(1), 1, "documents taken from a .txt file")


def add_window_arguments(parser: argparse.ArgumentParser, tail: int) -> None:
    """``--data --per-file --context --tail``.

    Args:
        tail: Default of ``--tail``.
    """
    add_source_arguments(parser)
    add_option(parser, "--context", whole(), 8192, "tokens of each document")
    add_option(parser, "--tail", whole(), tail, "last tokens of a document, which are decoded")


def check_window(args: argparse.Namespace) -> None:
    """``ConfigError`` for a tail that a document can't have."""
    if not 1 <= args.tail < args.context:
        raise ConfigError(f"--tail {args.tail}: expected 1 to below --context {args.context}")
