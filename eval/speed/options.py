"""What the parts have in common: the shape of a layer, how often to measure, how rows are shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from attention_predictor.csrc import ops
from attention_predictor.eval.bench import Row, report, with_ratios
from attention_predictor.loading import DTYPES, find_device
from attention_predictor.predictor.errors import ConfigError

BLOCK = 16

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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--dtype", default="auto", choices=sorted(DTYPES), help="auto: bf16 on a GPU, else fp32")
    for name in (*numbers, "repeats"):
        default, line = NUMBERS[name]
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{line} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(numbers=[name.replace("-", "_") for name in (*numbers, "repeats")])


def checked(args: argparse.Namespace, *, needs_kernels: bool = True) -> tuple[torch.device, torch.dtype]:
    """Device and dtype, once all options are found to be right; seeds torch.

    Raises:
        ConfigError: A number below 1, heads that KV heads don't divide, an unknown device, no kernels.
    """
    for name in args.numbers:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if "heads" in args.numbers and args.heads % args.kv_heads:
        raise ConfigError(f"--heads {args.heads}: expected a multiple of --kv-heads {args.kv_heads}")
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if needs_kernels and (reason := ops.missing(device)) is not None:
        raise ConfigError(f"there are no kernels to time: {reason}")
    torch.manual_seed(args.seed)
    return device, dtype


def show(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, rows: Sequence[Row]) -> int:
    """Report the ways to do a part, with ratios to the first one."""
    settings = {name: getattr(args, name) for name in args.numbers} | {"dtype": str(dtype).removeprefix("torch.")}
    ways = with_ratios(rows, "ms")
    report(args.subcommand, device, settings, ways, line=_line, as_json=args.json)
    return 0


def _line(row: Row) -> str:
    rate = f"{row['gb_per_s']:8.1f} GB/s" if "gb_per_s" in row else ""
    return (
        f"{row['name']:<44} {row['ms']:9.4f} ms {rate}   {row['ratio']:6.2f} × ours   ({row['eager_ms']:.4f} ms called)"
    )
