"""The published network, streamed against over its whole window: time a decoding step, on one CPU thread.

example:
  python scripts/bench_streaming.py --tokens 2048,32768,131072
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.streaming import StreamedHistory
from attention_predictor.predictor.window import WINDOW_ROWS, WindowPredictor

SINK = RECENT = 4  # blocks


def seconds_a_step(history: ScoreHistory, rows_RBGN: torch.Tensor, repeats: int) -> float:
    """Best of some steps: push one row, predict all blocks but sink and recent."""
    history.start(rows_RBGN.movedim(0, 2))
    best = float("inf")
    for repeat in range(repeats + 1):  # the first warms up
        started = time.perf_counter()
        history.push(rows_RBGN[repeat % len(rows_RBGN)])
        history.predict(SINK, history.n_blocks - RECENT)
        if repeat:
            best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2048,32768,131072", help="contexts (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="of one layer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, the best counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    network = WindowPredictor().eval()
    print(f"{platform.processor() or platform.machine()}, {args.threads} thread(s), torch {torch.__version__}")
    print("| tokens | window, ms | streamed, ms | ratio | largest difference |\n|---|---|---|---|---|")
    for tokens in (int(text) for text in args.tokens.split(",")):
        shape = {"batch": 1, "kv_heads": args.kv_heads, "device": "cpu"}
        windowed, streamed = ScoreHistory(network, **shape), StreamedHistory(network, **shape)
        rows_RBGN = torch.rand(WINDOW_ROWS, 1, args.kv_heads, tokens // 16) ** 8
        slow = seconds_a_step(windowed, rows_RBGN, args.repeats)
        fast = seconds_a_step(streamed, rows_RBGN, args.repeats)
        bounds = SINK, tokens // 16 - RECENT
        expected = windowed.predict(*bounds)[..., bounds[0] : bounds[1]]
        found = streamed.predict(*bounds)[..., bounds[0] : bounds[1]]
        difference = (found - expected).abs().max() / expected.abs().max()
        print(
            f"| {tokens} | {1000 * slow:.2f} | {1000 * fast:.2f} | {slow / fast:.1f} | {difference:.1e} |", flush=True
        )


if __name__ == "__main__":
    main()
