"""Options of timings of a part of a step: the shape of a layer, and how often to measure."""

from __future__ import annotations

import argparse

from attention_predictor.arguments import DTYPE_NAMES, add_device_argument, add_option
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import whole

# name: (default, what it counts)
NUMBERS = {
    "batch": (1, "sequences"),
    "heads": (32, "query heads"),
    "kv-heads": (8, "KV heads"),
    "head-dim": (128, "head size"),
    "budget": (1024, "tokens attended to"),
    "context": (32768, "tokens in all"),
    "blocks": (1024, "blocks gathered"),
    "repeats": (50, "timed calls"),
}


def add_options(parser: argparse.ArgumentParser, *numbers: str) -> None:
    """``--device --dtype --seed --json --repeats`` and these of ``NUMBERS``."""
    add_device_argument(parser)
    parser.add_argument(
        "--dtype", default="auto", choices=sorted(DTYPE_NAMES), help="auto: bfloat16 on a GPU, else float32"
    )
    for name in (*numbers, "repeats"):
        default, line = NUMBERS[name]
        add_option(parser, f"--{name}", whole(1), default, line)
    add_option(parser, "--seed", whole(), 0, "seed of everything random")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(numbers=[name.replace("-", "_") for name in (*numbers, "repeats")])


def check(args: argparse.Namespace) -> None:
    """``ConfigError`` for heads that KV heads don't divide."""
    if "heads" in args.numbers and args.heads % args.kv_heads:
        raise ConfigError(f"--heads {args.heads}: expected a multiple of --kv-heads {args.kv_heads}")
