"""``attnpred eval recovery``: answers found and attention mass recovered, on planted questions or document tails.

Both are benchmarks of the runner. The engine measures recovery (``measure_recovery``), and the runner writes it into
every record.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy import average

from attention_predictor.commands.eval.recovery import TAIL_INTERVAL
from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.synthetic import benchmark as synthetic
from attention_predictor.eval.benchmarks.synthetic.tasks import parse_tasks
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.bootstrap import normal_spread, wilson_interval
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.measure import Description, Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Benchmark, Plan, Sample, run
from attention_predictor.eval.harness.scores import mean_scores, notes, show_results
from attention_predictor.eval.harness.teacher_forcing import decode_tails, prefill
from attention_predictor.eval.harness.windows import WindowBenchmark, windows_of


class QuestionRecovery(synthetic.SyntheticBenchmark):
    """Planted questions, recovery measured while question and answer are decoded."""

    name = "recovery"
    measures_heads = True

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        return super().predict(evaluated, task, sample) | _measurements(evaluated)


class TailRecovery(WindowBenchmark):
    """Document tails, recovery measured while they are decoded; a sample is a document."""

    name = "recovery"
    measures_heads = True

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        prompt, tails = sample.hidden["prompt"], sample.hidden["tails"]
        cache = evaluated.new_cache()
        prefill(evaluated.model, cache, prompt, len(tails))
        best_BL = decode_tails(evaluated.model, cache, tails)
        found = {"sequences": len(tails), "prompt_tokens": len(prompt), "new_tokens": best_BL.shape[1]}
        return found | _measurements(evaluated)


def _measurements(evaluated: EvaluatedModel) -> dict[str, int]:
    """``recovery_count``: how many values the record's recovery is the mean of, its weight among documents."""
    return {} if evaluated.engine is None else {"recovery_count": evaluated.engine.stats.recovery_count}


def relative_recovery(task: str, records: Sequence[Record]) -> list[float]:
    """Mean relative recovery of each document; NaN where it was not measured."""
    return [float("nan") if one.get("relative_recovery") is None else one["relative_recovery"] for one in records]


FOUND = Measure("Planted questions", "right, %", synthetic.sample_scores)
RELATIVE = Measure(
    *("Recovery", "relative recovery, %", relative_recovery),
    weight=lambda record: float(record.get("recovery_count", 0)),
    failed="left out of the figures",
)


def measures(description: Description) -> list[Measure]:
    """Answers found, unless tails were decoded, and relative recovery."""
    return [RELATIVE] if "tail" in description["settings"] else [FOUND, RELATIVE]


def main(args: argparse.Namespace) -> int:
    if args.tail is not None:
        args.recovery = args.recovery or TAIL_INTERVAL
    with ExitStack() as stack:
        if args.out is None:
            if Processes().count > 1:
                raise ConfigError("several processes need --out, the directory of the run they share")
            args.out = Path(stack.enter_context(TemporaryDirectory())) / "run"
        plan = Plan.of(args, measure_recovery=args.recovery)
        benchmark = _benchmark(args)
        return show_results(run(benchmark, plan), RELATIVE if args.tail is not None else FOUND, folder_table)


def _benchmark(args: argparse.Namespace) -> Benchmark:
    if args.tail is None:
        args.data = Path(args.data)
        return synthetic.make_benchmark(args, QuestionRecovery, [synthetic.MIXED.join(parse_tasks(args.tasks))])
    args.data = [args.data]
    return TailRecovery(windows_of(args, continuations=True))


def folder_table(folder: RunFolder, measure: Measure) -> str:
    """Variants down: share of right answers, recovery and relative recovery, from 0 to 1, with 95% intervals."""
    asked = "tail" not in folder.description["settings"]
    rows = []
    for variant in folder.variants:
        records = [one for task in folder.tasks for one in folder.records(variant, task)]
        rows.append((variant, *([_found(records)] if asked else []), *_recovered(records)))
    titles = ("variant", *(["found [95% interval]"] if asked else []), "recovery", "relative ± half its 95% interval")
    return text_table(titles, rows, notes(mean_scores(folder, measure), measure.failed))


def _found(records: Sequence[Record]) -> str | None:
    found, asked = sum(sum(one["found"]) for one in records), sum(len(one["answers"]) for one in records)
    if not asked:
        return None
    low, high = wilson_interval(found, asked)
    return f"{found / asked:.3f} [{low:.2f}, {high:.2f}]"


def _recovered(records: Sequence[Record]) -> tuple[str | None, str | None]:
    """Means over all measured values; the interval is over documents."""
    measured = [one for one in records if one.get("relative_recovery") is not None]
    if not measured:
        return None, None
    relative = [one["relative_recovery"] for one in measured]
    spread = f" ± {normal_spread(relative):.3f}" if len(relative) > 1 else ""
    weights = [one["recovery_count"] for one in measured]
    share = average([one["recovery"] for one in measured], weights=weights)
    return f"{share:.3f}", f"{average(relative, weights=weights):.3f}{spread}"
