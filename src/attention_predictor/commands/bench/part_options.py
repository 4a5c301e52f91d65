"""Options of timings of a part of a step: the shape of a layer, and how often to measure."""

from __future__ import annotations

import argparse

from attention_predictor.arguments import DTYPE_NAMES, add_device_argument, add_option
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import SEED, whole

# name: (default, what it counts)
NUMBERS = {
    "batch": (1, "sequences in the batch"),
    "heads": (32, "number of query heads"),
    "kv-heads": (8, "number of KV heads"),
    "head-dim": (128, "size of a head"),
    "budget": (1024, "tokens that each KV head attends to"),
    "context": (32768, "tokens in the cache"),
    "blocks": (1024, "number of blocks to transfer"),
    "repeats": (50, "number of timed calls"),
}


def add_options(parser: argparse.ArgumentParser, *numbers: str) -> None:
    """``--device --dtype --seed --json --repeats`` and these of ``NUMBERS``."""
    add_device_argument(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=sorted(DTYPE_NAMES),
        help="number type; auto: bfloat16 on a GPU, else float32 (default: auto)",
    )
    for name in (*numbers, "repeats"):
        default, line = NUMBERS[name]
        add_option(parser, f"--{name}", whole(1), default, line)
    add_option(parser, "--seed", SEED, 0, "random seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(shown=[name.replace("-", "_") for name in (*numbers, "repeats")])


def check(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` if ``--heads`` is not a multiple of ``--kv-heads``."""
    if "heads" in args.shown and args.heads % args.kv_heads:
        raise ConfigError(f"--heads {args.heads}: expected a multiple of --kv-heads {args.kv_heads}")
