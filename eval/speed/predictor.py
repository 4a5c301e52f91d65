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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from attention_predictor.arguments import whole_numbers
from attention_predictor.eval.bench import Row, report, with_ratios
from attention_predictor.eval.speed.options import BLOCK, add_options, checked
from attention_predictor.eval.speed.stopwatch import input_sets, timed
from attention_predictor.predictor import history, streaming
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.errors import ConfigError
from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.streaming import StreamedHistory
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
    """A predictor and how its history is kept; ``missing`` says why it can't be by kernels."""

    name: str
    history: Callable[..., ScoreHistory]
    predictor: AttentionPredictor
    kv_heads: int
    kernel: bool = False
    missing: str | None = None


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
    missing, missing_streamed = history.no_kernel(default, device), streaming.no_kernel(published, device)
    kept, streamed, G = ScoreHistory, StreamedHistory, args.kv_heads
    ways = (
        Way("ours, kernels", kept, default, G, kernel=True, missing=missing),
        Way("ours, torch operations", kept, default, G),
        Way("published, streamed, kernels", streamed, published, G, kernel=True, missing=missing_streamed),
        Way("published, streamed", streamed, published, G),
        Way("published, over its window", kept, published, G),
        Way("published, over its window, each query head", kept, published, args.heads),
    )
    rows: list[Row] = []
    for tokens in contexts:
        rows += with_ratios([_timed(way, tokens, args, device) for way in ways], "ms")
    settings = {name: getattr(args, name) for name in (*args.numbers, "layers")} | {"predictor": "default"}
    report(args.subcommand, device, settings, rows, line=_line, as_json=args.json)
    return 0


def _timed(way: Way, tokens: int, args: argparse.Namespace, device: torch.device) -> Row:
    if way.missing is not None:
        return {"name": way.name, "tokens": tokens, "skipped": way.missing}
    n_blocks = tokens // BLOCK
    rows_BGRN = torch.rand(args.batch, way.kv_heads, WINDOW_ROWS, n_blocks, device=device) ** 8  # few large ones

    def started() -> ScoreHistory:
        state = way.history(way.predictor, batch=args.batch, kv_heads=way.kv_heads, device=device, kernel=way.kernel)
        state.start(rows_BGRN)
        return state

    def step(state: ScoreHistory) -> None:
        state.push(rows_BGRN[:, :, 0])
        state.predict(SINK, n_blocks - RECENT)

    first = started()
    layers = min(input_sets(first.nbytes, device), args.layers)  # in turn, as those of a model
    calls = [partial(step, state) for state in (first, *(started() for _ in range(layers - 1)))]
    row = timed(way.name, calls, device, repeats=args.repeats, seconds=args.seconds)
    return {**row, "tokens": tokens, "token_ms": row["ms"] * args.layers}


def _line(row: Row) -> str:
    return (
        f"{row['tokens']:>8} tokens  {row['name']:<44} {row['ms']:9.4f} ms a layer {row['token_ms']:9.2f} ms a token"
        f"   {row['ratio']:7.2f} × ours   ({row['eager_ms']:.4f} ms called)"
    )
