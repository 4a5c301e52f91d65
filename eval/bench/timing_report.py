"""Prints timings as text or JSON, with machine and settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Row = Mapping[str, Any]
SIZES = ("context", "tokens")  # fields of rows that say how long the context is


def machine(device: torch.device) -> str:
    """Name of the machine and torch version."""
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
    """Print rows, each by ``line`` (a format or a function), skipped ones by size, name and reason."""
    if as_json:
        found = {"part": part, "machine": machine(device), "settings": dict(settings), "timings": [*map(dict, rows)]}
        print(json.dumps(found))
        return
    print(f"{part}, {machine(device)}: " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    show = line.format_map if isinstance(line, str) else line
    for row in rows:
        print("  " + (skipped(row) if "skipped" in row else show(row)))


def skipped(row: Row) -> str:
    """The line of a row that was not timed, with whatever of batch and context it has."""
    sizes = [f"{row['batch']} ×"] * ("batch" in row) + [f"{row[name]} tokens" for name in SIZES if name in row]
    return f"{' '.join(sizes):<22} {row['name']:<34} skipped: {row['skipped']}".lstrip()
