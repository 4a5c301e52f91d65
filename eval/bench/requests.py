"""``attnpred bench requests``: plain requests, one after another, each with a prompt and a cache of its own."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from attention_predictor.commands.bench.requests import NAMES
from attention_predictor.errors import HostMemoryError, one_line
from attention_predictor.eval.bench.cache_setups import names_in
from attention_predictor.eval.bench.device import release, wait
from attention_predictor.eval.bench.random_models import random_or_loaded
from attention_predictor.eval.bench.timing_report import Row, report
from attention_predictor.loading import find_device
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attach import attach
from attention_predictor.progress import Progress
from attention_predictor.sizes import size_text


def main(args: argparse.Namespace) -> int:
    setups = names_in(args.ways, NAMES)
    device = find_device(args.device)
    model = random_or_loaded(args, device, args.context + args.new_tokens)
    rows: list[dict[str, Any]] = []
    for setup in setups:
        row: dict[str, Any] = {"way": setup, "name": NAMES[setup]}
        try:
            row |= served(model, args, setup)
        except (torch.OutOfMemoryError, HostMemoryError) as error:
            row["skipped"] = one_line(error, 200)
        rows.append(row)
        release(device)
    del model
    if args.fresh:
        release(device)  # the next process needs the room
        for row in rows:
            row["fresh_s"] = _fresh(row["way"])
    add_ratios(rows)
    settings = {name: getattr(args, name) for name in ("context", "batch", "requests", "new_tokens", "budget", "seed")}
    settings["model"] = args.shape or str(args.model)
    report("requests", device, settings, rows, line=_describe, as_json=args.json)
    return 0


def served(model: PreTrainedModel, args: argparse.Namespace, setup: str) -> dict[str, Any]:
    """Run requests one after another under one setup."""
    found: dict[str, list[Any]] = {"first_s": [], "token_ms": [], "held_bytes": [], "process_bytes": []}
    attached: Any = attach(model, OffloadConfig(budget=args.budget)) if setup == "ours" else nullcontext()
    with attached as engine, Progress(NAMES[setup], args.requests, "requests") as progress:
        for number in range(args.requests):
            ids_BT = _prompt(model, args, number)
            first_s, token_ms = _request(model, ids_BT, args.new_tokens)
            found["first_s"].append(first_s)
            found["token_ms"].append(token_ms)
            found["held_bytes"].append(_held(engine))
            found["process_bytes"].append(psutil.Process().memory_info().rss)
            tokens = "" if token_ms is None else f", then {token_ms:.1f} ms a token"
            progress.write(f"{NAMES[setup]}: request {number + 1}: first token {first_s:.3f} s{tokens}")
            progress.update()
        if engine is not None:
            found |= {"engine": engine.stats.to_dict()}
    return found


class _Clock(BaseStreamer):
    """Records when each token reaches the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # the first is the prompt's, and comes at once

    def end(self) -> None:
        pass


def _request(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> tuple[float, float | None]:
    """Seconds to the first token, milliseconds for each further one (without the first eight, which set things up)."""
    clock = _Clock()
    wait(ids_BT.device)
    begun = time.perf_counter()
    model.generate(  # type: ignore[operator]  # mixed in by a class that mypy does not see
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        streamer=clock if len(ids_BT) == 1 else None,
    )
    if len(ids_BT) > 1:
        return time.perf_counter() - begun, None  # transformers streams single sequences only
    further = [1000 * (b - a) for a, b in zip(clock.times[9:], clock.times[10:], strict=False)]
    return clock.times[1] - begun, statistics.median(further) if further else None


def _prompt(model: PreTrainedModel, args: argparse.Namespace, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed + number)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocabulary, (args.batch, args.context), generator=generator).to(model.device)


def _held(engine: Engine | None) -> int:
    return 0 if engine is None else engine.runtime.memory.held_bytes


def _fresh(setup: str) -> float | None:
    """Seconds to the first token of a process: this command again, with one request."""
    given = [argument for argument in sys.argv[1:] if argument not in ("--fresh", "--json")]
    command = [sys.executable, "-m", "attention_predictor.cli", *given, "--ways", setup, "--requests", "1", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    return json.loads(done.stdout)["timings"][0]["first_s"][0]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add each setup's ratios to the stock model, warm and in a fresh process."""
    stock = next((row for row in rows if row["way"] == "device" and "first_s" in row), None)
    if stock is None:
        return
    warm_s = statistics.median(stock["first_s"][1:] or stock["first_s"])
    for row in rows:
        if "first_s" in row:
            row["warm_ratio"] = statistics.median(row["first_s"][1:] or row["first_s"]) / warm_s
        if row.get("fresh_s") is not None and stock.get("fresh_s") is not None:
            row["fresh_ratio"] = row["fresh_s"] / stock["fresh_s"]


def _describe(row: Row) -> str:
    first = row["first_s"]
    picked = {1: first[0], 2: first[min(1, len(first) - 1)], len(first): first[-1]}
    requests = ", ".join(f"request {number} {seconds:.3f} s" for number, seconds in picked.items())
    parts = [f"{row['name']:<28}first token: {requests}"]
    if "warm_ratio" in row:
        parts.append(f"median from the second on {row['warm_ratio']:.3f} × stock")
    if row.get("fresh_s") is not None:
        ratio = f" ({row['fresh_ratio']:.3f} × stock)" if "fresh_ratio" in row else ""
        parts.append(f"fresh process {row['fresh_s']:.3f} s{ratio}")
    if tokens := [value for value in row["token_ms"] if value is not None]:
        parts.append(f"{statistics.median(tokens):.2f} ms a further token")
    held = row["held_bytes"]
    if held[-1]:
        parts.append(
            f"host memory held {size_text(held[min(1, len(held) - 1)])} after 2, {size_text(held[-1])} at the end"
        )
    return "; ".join(parts)
