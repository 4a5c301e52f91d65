"""Shared by all parts: device and dtype of their options, and the printed rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from attention_predictor.csrc import ops
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.timing_report import Row, report, with_ratios
from attention_predictor.loading import DTYPES, find_device

BLOCK = 16


def checked(args: argparse.Namespace, *, needs_kernels: bool = True) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; seeds torch.

    Raises:
        ConfigError: An unknown device, no kernels.
    """
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if needs_kernels and (reason := ops.why_no_kernels(device)) is not None:
        raise ConfigError(f"there are no kernels to time: {reason}")
    torch.manual_seed(args.seed)
    return device, dtype


def show(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, rows: Sequence[Row]) -> int:
    """Report the timed methods, with ratios to the first one."""
    settings = {name: getattr(args, name) for name in args.shown} | {"dtype": str(dtype).removeprefix("torch.")}
    methods = with_ratios(rows, "ms")
    report(args.subcommand, device, settings, methods, line=_line, as_json=args.json)
    return 0


def _line(row: Row) -> str:
    rate = f"{row['gb_per_s']:8.1f} GB/s" if "gb_per_s" in row else ""
    return (
        f"{row['name']:<44} {row['ms']:9.4f} ms {rate}   {row['ratio']:6.2f} × ours   ({row['eager_ms']:.4f} ms called)"
    )
