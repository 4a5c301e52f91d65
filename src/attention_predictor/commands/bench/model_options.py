"""Options of timings of a whole model: the model or a named shape, budget and batch."""

from __future__ import annotations

import argparse

from attention_predictor.arguments import (
    DTYPE_NAMES,
    add_model_arguments,
    add_option,
    check_model_arguments,
)
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.named_shapes import SHAPES, check_shape
from attention_predictor.kinds import whole
from attention_predictor.settings import add_setting, offload_config


def add_shape_arguments(parser: argparse.ArgumentParser, *, batch: bool = True) -> None:
    """``--model`` and others, ``--shape --budget --batch --json``; ``batch``: whether there is one batch to ask for."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--shape",
        metavar="S",
        help=f"time random weights in this shape, instead of --model: {', '.join(SHAPES)}",
    )
    add_setting(parser, "budget")
    if batch:
        add_option(parser, "--batch", whole(1), 1, "sequences in the batch, all with the same tokens")
    add("--json", action="store_true", help="print one JSON object")


def check_shape_arguments(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for wrong values of these options."""
    if args.shape is None:
        check_model_arguments(args)
    else:
        check_shape(args.shape)
        if args.dtype not in DTYPE_NAMES:
            raise ConfigError(f"--dtype {args.dtype}: --shape has weights of one of {', '.join(DTYPE_NAMES)}")
        if args.gguf_file is not None:
            raise ConfigError(f"--gguf-file {args.gguf_file}: --shape {args.shape} has random weights: give only one")
    offload_config(args)
