"""Train a predictor: record a model's attention, train on it, and compare the result with simple rules.

This short training on little text only shows the steps; docs/guide.md has the recipe of the shipped predictor. The text
is cut into parts, because training holds out whole texts for validation. A second run with the same --out repeats
neither recording nor training.

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
    """Run a command as on the command line; stop if it fails. The command prints its own error."""
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

    if not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
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
    run(
        *("train", "--data", histories, "--out", predictor, "--steps", args.steps, "--log-every", args.steps),
        *("--batch", 8, "--resume"),
    )
    run(
        *("eval", "recovery", *model, "--data", texts, "--tail", 16, "--context", args.tokens, "--budgets", 256),
        *("--documents", 2),
        *("--rule", f"mine: predictor,late_fetch=0,predictor={predictor}"),
        *("--rule", "shipped: predictor,late_fetch=0", "--rule", "last row: predictor,late_fetch=0,predictor=last"),
    )


if __name__ == "__main__":
    main()
