"""Options of timings of a whole model: a shape in place of weights, and how much it is given."""

from __future__ import annotations

import argparse

from attention_predictor.arguments import DTYPE_NAMES, add_model_arguments, add_option, check_model_name
from attention_predictor.errors import ConfigError
from attention_predictor.eval.named_shapes import SHAPES, check_shape
from attention_predictor.kinds import whole
from attention_predictor.settings import add_setting, offload_config


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` and others, ``--shape --budget --batch --json``."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--shape", metavar="S", help=f"a random model in place of --model: one of {', '.join(SHAPES)}")
    add_setting(parser, "budget")
    add_option(parser, "--batch", whole(1), 1, "sequences of the same tokens")
    add("--json", action="store_true", help="print one JSON object")


def check_shape_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong with them."""
    if args.shape is not None:
        check_shape(args.shape)
    else:
        check_model_name(args.model)
    if args.dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype {args.dtype}: expected one of {', '.join(DTYPE_NAMES)}")
    offload_config(args)
