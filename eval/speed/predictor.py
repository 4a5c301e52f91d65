"""Time one step of a predictor in one layer: a row observed, all candidates scored for the next token.

The default predictor by its kernels, where there are some, and by torch operations; the published network streamed, by
kernels and by torch operations, and over its whole window, for each KV head as here and for each query head as
published. Rows and weights don't matter for time: rows are random, and so are the published network's weights.

Milliseconds are the device's own, from replayed CUDA graphs; in parentheses what a single call from Python takes. Those
of a token are for --layers layers.

examples:
  attnpred bench predictor
  attnpred bench predictor --tokens 2048,32768 --device cpu --repeats 5
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from attention_predictor.arguments import whole_numbers
from attention_predictor.eval.bench import Row, report, with_ratios
from attention_predictor.eval.speed.options import BLOCK, add_options, checked
from attention_predictor.eval.speed.stopwatch import timed
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.errors import ConfigError
from attention_predictor.predictor.history import ScoreHistory, no_kernel
from attention_predictor.predictor.model import new_history
from attention_predictor.predictor.window import WINDOW_ROWS, WindowPredictor

SINK = RECENT = 4  # blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, "batch", "heads", "kv-heads")
    parser.add_argument(
        "--tokens", default="2048,8192,32768,131072,524288,1048576", metavar="N,…", help="contexts (%(default)s)"
    )
    parser.add_argument("--layers", type=int, default=32, metavar="N", help="of a whole token (%(default)s)")
    what = "for each of the two measurements of a way; fewer repeats rather than more time (%(default)s)"
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help=what)


@dataclass(frozen=True)
class Way:
    """A predictor and how it is evaluated: by kernels, streamed where it can be, or over its whole window."""

    name: str
    predictor: AttentionPredictor
    kv_heads: int
    kernels: bool = False
    whole: bool = False

    def history(self, batch: int, device: torch.device) -> ScoreHistory:
        """An empty one."""
        form: dict[str, Any] = {"batch": batch, "kv_heads": self.kv_heads, "device": device}
        if self.whole:
            return ScoreHistory(self.predictor, **form)
        return new_history(self.predictor, **form, kernels=self.kernels)


def main(args: argparse.Namespace) -> int:
    device, _ = checked(args, needs_kernels=False)
    contexts = whole_numbers("--tokens", args.tokens)
    least = (SINK + RECENT + 1) * BLOCK
    if min(contexts) < least:
        raise ConfigError(f"--tokens {args.tokens}: expected at least {least}")
    if args.layers < 1:
        raise ConfigError(f"--layers {args.layers}: expected at least 1")
    published = WindowPredictor().to(device).eval()
    default = AttentionPredictor.from_pretrained("default", device=device)
    ways = (
        Way("ours, kernels", default, args.kv_heads, kernels=True),
        Way("ours, torch operations", default, args.kv_heads),
        Way("published, streamed, kernels", published, args.kv_heads, kernels=True),
        Way("published, streamed", published, args.kv_heads),
        Way("published, over its window", published, args.kv_heads, whole=True),
        Way("published, over its window, each query head", published, args.heads, whole=True),
    )
    rows: list[Row] = []
    for tokens in contexts:
        rows += with_ratios([_timed(way, tokens, args, device) for way in ways], "ms")
    settings = {name: getattr(args, name) for name in (*args.numbers, "layers")} | {"predictor": "default"}
    report(args.subcommand, device, settings, rows, line=_line, as_json=args.json)
    return 0


def _timed(way: Way, tokens: int, args: argparse.Namespace, device: torch.device) -> Row:
    if way.kernels and (reason := no_kernel(way.predictor, device)) is not None:
        return {"name": way.name, "tokens": tokens, "skipped": reason}
    history, n_blocks = way.history(args.batch, device), tokens // BLOCK
    rows_BGRN = torch.rand(args.batch, way.kv_heads, WINDOW_ROWS, n_blocks, device=device) ** 8  # few large ones
    history.start(rows_BGRN)

    def step() -> None:
        history.push(rows_BGRN[:, :, 0])
        history.predict(SINK, n_blocks - RECENT)

    row = timed(way.name, [step], device, repeats=args.repeats, seconds=args.seconds)
    return {**row, "tokens": tokens, "token_ms": row["ms"] * args.layers}


def _line(row: Row) -> str:
    return (
        f"{row['tokens']:>8} tokens  {row['name']:<44} {row['ms']:9.4f} ms a layer {row['token_ms']:9.2f} ms a token"
        f"   {row['ratio']:7.2f} × ours   ({row['eager_ms']:.4f} ms called)"
    )
