"""Time decoding, or a part of it, against what it replaces, in one process."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attention_predictor.eval.subcommands import add_subcommands, run_subcommand

PARTS = {
    "decode": ("attention_predictor.eval.decode", "whole steps of a model, against the stock caches"),
    "prefill": ("attention_predictor.eval.prefill", "the prefill of a long prompt, against the stock caches"),
    "requests": ("attention_predictor.eval.requests", "requests one after another: first token, memory"),
    "attention": ("attention_predictor.eval.speed.attention", "one token over the blocks of a pool"),
    "sketch": ("attention_predictor.eval.speed.sketch", "scores of all blocks by the key sketch"),
    "predictor": ("attention_predictor.eval.speed.predictor", "scores of all blocks for the next token"),
    "gather": ("attention_predictor.eval.speed.gather", "blocks from host memory to the pool"),
}
Row = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, PARTS)


main = run_subcommand


def machine(device: torch.device) -> str:
    """What the timings were taken on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def with_ratios(rows: Sequence[Row], by: str) -> list[dict[str, Any]]:
    """Each row with its ``ratio`` to the first one that has ``by``; rows without it (skipped ones) stay as they are."""
    base = next((row[by] for row in rows if by in row), None)
    return [{**row, "ratio": row[by] / base} if by in row else dict(row) for row in rows]


def report(
    part: str,
    device: torch.device,
    settings: Row,
    rows: Sequence[Row],
    *,
    line: str | Callable[[Row], str],
    as_json: bool,
) -> None:
    """Print rows: each by ``line``, a format or a function; one that was ``skipped`` by name and reason."""
    if as_json:
        found = {"part": part, "machine": machine(device), "settings": dict(settings), "timings": [*map(dict, rows)]}
        print(json.dumps(found))
        return
    print(f"{part}, {machine(device)}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    show = line.format_map if isinstance(line, str) else line
    for row in rows:
        print("  " + (f"{row['name']:<44} skipped: {row['skipped']}" if "skipped" in row else show(row)))
