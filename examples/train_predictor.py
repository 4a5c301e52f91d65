"""Train a predictor: record what a model's attention does, learn from it, and compare the result with simple rules.

So short a training on so little text shows the steps, no more: docs/guide.md has the recipe of the shipped predictor.
The text is cut into parts, since training keeps whole texts apart to judge by. A second run with the same --out records
and trains nothing again.

example:
  python examples/train_predictor.py --out runs/example-predictor
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attention_predictor.cli import main as attnpred

ROOT = Path(__file__).resolve().parents[1]
PARTS = 4


def run(*words: object) -> None:
    """A command as on the command line; if it fails, it has said why."""
    print("\n$ attnpred", *words, flush=True)
    if code := attnpred([str(word) for word in words]):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "pocket-lm"), help="directory or hub name")
    parser.add_argument("--data", type=Path, default=ROOT / "scripts" / "demo_text.txt", help="text to learn from")
    parser.add_argument("--out", type=Path, default=Path("runs/example-predictor"), help="directory (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each document (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of training (%(default)s)")
    args = parser.parse_args()

    texts, histories, predictor = (args.out / name for name in ("texts", "histories", "predictor"))
    words = args.data.read_text(encoding="utf-8")
    texts.mkdir(parents=True, exist_ok=True)
    for part in range(PARTS):
        start, end = (len(words) * at // PARTS for at in (part, part + 1))
        (texts / f"part-{part}.txt").write_text(words[start:end], encoding="utf-8")
    model = ("--model", args.model)
    run(
        *("record", *model, "--data", texts, "--out", histories, "--max-tokens", args.tokens, "--steps", 80),
        *("--per-file", 1, "--validation", 0),  # train holds out a part by itself
    )
    if not (predictor / "config.json").exists():
        run(
            *("train", "--data", histories, "--out", predictor, "--steps", args.steps, "--log-every", args.steps),
            *("--batch", 8),
        )
    run(
        *("eval", "recovery", *model, "--data", texts, "--tail", 16, "--context", args.tokens, "--budgets", 256),
        *("--documents", 2),
        *("--rule", f"mine: predictor,late_fetch=0,predictor={predictor}"),
        *("--rule", "shipped: predictor,late_fetch=0", "--rule", "last row: predictor,late_fetch=0,predictor=last"),
    )


if __name__ == "__main__":
    main()
