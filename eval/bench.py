"""Time decoding, or a part of it, against what it replaces, in one process."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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


def report(
    part: str,
    device: torch.device,
    settings: Mapping[str, Any],
    timings: Sequence[Mapping[str, Any]],
    *,
    by: str,
    line: str,
    as_json: bool,
) -> None:
    """Print timings, ours first: `by` names their milliseconds, whose ratio to ours is added; `line` shows one."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rows = [{**one, "ratio": one[by] / timings[0][by]} for one in timings]
    if as_json:
        print(json.dumps({"part": part, "machine": machine, "settings": settings, "timings": rows}))
        return
    print(f"{part}, {machine}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    for row in rows:
        print(f"  {line.format(**row)}   {row['ratio']:6.2f} × ours")
