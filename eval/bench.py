"""Time decoding, or a part of it, against what it replaces, in one process."""

from __future__ import annotations

import argparse

from attention_predictor.eval.subcommands import add_subcommands, run_subcommand

PARTS = {
    "decode": ("attention_predictor.eval.decode", "whole steps of a model, against the stock caches"),
    "attention": ("attention_predictor.eval.speed", "one token over the blocks of a pool"),
    "sketch": ("attention_predictor.eval.speed", "scores of all blocks by the key sketch"),
    "gather": ("attention_predictor.eval.speed", "blocks from host memory to the pool"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, PARTS)


main = run_subcommand
