"""Make a table: questions about planted facts, answered under several policies, and a report of the results.

The model must find the facts in a document that it has already read. A policy that keeps only
first and last tokens loses them. An interrupted run continues when it is started again with the same --out.

example:
  python examples/make_table.py --out runs/example-table
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attention_predictor.cli import main as attnpred

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object) -> None:
    """Run a command as on the command line; stop if it fails. The command prints its own error."""
    print("\n$ attnpred", *words, flush=True)
    if code := attnpred([str(word) for word in words]):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "pocket-lm"), help="directory or hub name")
    parser.add_argument("--out", type=Path, default=Path("runs/example-table"), help="directory (%(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a document (%(default)s)")
    parser.add_argument("--questions", type=int, default=5, help="of each task (%(default)s)")
    args = parser.parse_args()

    run(
        *("eval", "synthetic", "--model", args.model, "--data", ROOT / "scripts" / "demo_text.txt"),
        *("--context", args.context, "--questions", args.questions, "--per-document", 5),
        *("--policies", "full,predictor,streaming", "--rule", "ahead only: predictor,late_fetch=0"),
        *("--budgets", "256", "--out", args.out / "synthetic"),
    )
    run("report", args.out / "synthetic", "--out", args.out / "report")


if __name__ == "__main__":
    main()
