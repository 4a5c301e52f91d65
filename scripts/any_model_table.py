"""Print relative recovery and MB fetched a token of finished `attnpred eval recovery` runs, a pair of columns each.

example:
  python scripts/any_model_table.py runs/any/judged-pocket runs/any/judged-smollm2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from numpy import average

from attention_predictor.errors import ConfigError
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.bootstrap import normal_spread
from attention_predictor.eval.harness.run_folder import RunFolder


def cells(folder: RunFolder, variant: str) -> tuple[str | None, str | None]:
    """Mean relative recovery with half its 95% interval over documents, and MB fetched a decoded token."""
    if variant not in folder.variants:
        return None, None
    records = [one for task in folder.tasks for one in folder.records(variant, task)]
    measured = [one for one in records if one.get("relative_recovery") is not None]
    if not measured:
        return None, None
    relative = [one["relative_recovery"] for one in measured]
    mean = average(relative, weights=[one["recovery_count"] for one in measured])
    spread = f" ± {normal_spread(relative):.4f}" if len(relative) > 1 else ""
    fetched = sum(one["fetched_bytes"] for one in measured) / sum(one["steps"] for one in measured)
    return f"{mean:.4f}{spread}", f"{fetched / 1e6:.2f}"


def table(folders: Sequence[RunFolder]) -> str:
    """Variants down, runs across."""
    variants = dict.fromkeys(variant for folder in folders for variant in folder.variants)
    rows = [(variant, *(cell for folder in folders for cell in cells(folder, variant))) for variant in variants]
    titles = [title for folder in folders for title in (folder.path.name, "MB a token")]
    return text_table(("variant", *titles), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    try:
        print(table([RunFolder.finished(run) for run in parser.parse_args().runs]))
    except ConfigError as error:
        print(f"any_model_table.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
