"""``attnpred bench predictor``: a step's logits observed, all candidates scored for the next token."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from attention_predictor.arguments import whole_numbers
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.parts.options import BLOCK, checked
from attention_predictor.eval.bench.parts.stopwatch import input_sets, timed
from attention_predictor.eval.bench.timing_report import Row, report, with_ratios
from attention_predictor.predictor import history, incremental
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.incremental import IncrementalHistory
from attention_predictor.predictor.window import WINDOW_ROWS, WindowPredictor
from attention_predictor.progress import Progress

SINK = RECENT = 4  # blocks
ATTENDED = 64  # blocks attended in a step


@dataclass(frozen=True)
class PredictorMethod:
    """A predictor and its kind of history; ``missing`` says why kernels can't be used."""

    name: str
    history: Callable[..., ScoreHistory]
    predictor: AttentionPredictor
    heads: int
    kv_heads: int
    kernel: bool = False
    missing: str | None = None


def main(args: argparse.Namespace) -> int:
    device, _ = checked(args, needs_kernels=False)
    contexts = whole_numbers("--tokens", args.tokens)
    least = (SINK + RECENT + 1) * BLOCK
    if min(contexts) < least:
        raise ConfigError(f"--tokens {args.tokens}: expected at least {least}")
    published = WindowPredictor().to(device).eval()
    default = AttentionPredictor.from_pretrained("default", device=device)
    missing, missing_streamed = history.why_no_kernel(default, device), incremental.why_no_kernel(published, device)
    kept, streamed, shape = ScoreHistory, IncrementalHistory, (args.heads, args.kv_heads)
    methods = (
        PredictorMethod("ours, kernels", kept, default, *shape, kernel=True, missing=missing),
        PredictorMethod("ours, torch operations", kept, default, *shape),
        PredictorMethod(
            "published, streamed, kernels", streamed, published, *shape, kernel=True, missing=missing_streamed
        ),
        PredictorMethod("published, streamed", streamed, published, *shape),
        PredictorMethod("published, over its window", kept, published, *shape),
        PredictorMethod("published, over its window, each query head", kept, published, args.heads, args.heads),
    )
    rows: list[Row] = []
    with Progress("predictor", len(contexts) * len(methods), "measurements") as progress:
        for tokens in contexts:
            found = []
            for method in methods:
                progress.describe(f"{method.name}, {tokens} tokens")
                found.append(_timed(method, tokens, args, device))
                progress.update()
            rows += with_ratios(found, "ms")
    settings = {name: getattr(args, name) for name in (*args.shown, "layers")} | {"predictor": "default"}
    report(args.subcommand, device, settings, rows, line=_line, as_json=args.json)
    return 0


def _timed(method: PredictorMethod, tokens: int, args: argparse.Namespace, device: torch.device) -> Row:
    if method.missing is not None:
        return {"name": method.name, "tokens": tokens, "skipped": method.missing}
    n_blocks = tokens // BLOCK
    rows_BGRN = torch.rand(args.batch, method.kv_heads, WINDOW_ROWS, n_blocks, device=device) ** 8  # few large ones

    def started() -> ScoreHistory:
        state = method.history(
            method.predictor, batch=args.batch, kv_heads=method.kv_heads, device=device, kernel=method.kernel
        )
        state.start(rows_BGRN)
        return state

    # As decoding calls it: logits of the attended blocks, estimates of all, the length on the device.
    B, H, G, S = args.batch, method.heads, method.kv_heads, min(ATTENDED, n_blocks)
    peak_BHN, total_BH = torch.randn(B, H, n_blocks, device=device), torch.full((B, H), 8.0, device=device)
    block_BGS, slot_peak_BHS = torch.arange(S, device=device).repeat(B, G, 1), torch.randn(B, H, S, device=device)
    length_B = torch.full((B,), tokens, device=device)

    def step(state: ScoreHistory) -> None:
        state.observe_slots(peak_BHN, block_BGS, slot_peak_BHS, total_BH, length_B)
        state.predict_ahead(SINK, RECENT * BLOCK, length_B, None, n_blocks)

    first = started()
    layers = min(input_sets(first.nbytes, device), args.layers)  # cycled, like a model's layers
    calls = [partial(step, state) for state in (first, *(started() for _ in range(layers - 1)))]
    row = timed(method.name, calls, device, repeats=args.repeats, seconds=args.seconds)
    return {**row, "tokens": tokens, "token_ms": row["ms"] * args.layers}


def _line(row: Row) -> str:
    return (
        f"{row['tokens']:>8} tokens  {row['name']:<44} {row['ms']:9.4f} ms a layer {row['token_ms']:9.2f} ms a token"
        f"   {row['ratio']:7.2f} × ours   ({row['eager_ms']:.4f} ms called)"
    )
