"""Mean scores of a run's samples, and what must be said beside them: what failed, what is not done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from attention_predictor.eval.display.text_table import plain_table
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.run_folder import RunFolder

SampleScores = Callable[[str, Sequence[Record]], list[float]]


@dataclass(frozen=True)
class Mean:
    """Of one variant's samples of one task.

    Attributes:
        percent: Their mean score, ``None`` where none is done.
        samples, errors: How many there are, and how many of them failed.
    """

    percent: float | None
    samples: int
    errors: int


Means = Mapping[str, Mapping[str, Mean]]  # by variant and task


def mean_scores(folder: RunFolder, sample_scores: SampleScores) -> dict[str, dict[str, Mean]]:
    """Of every variant and task of a run."""
    return {
        variant: {task: _mean(folder.records(variant, task), sample_scores, task) for task in folder.tasks}
        for variant in folder.variants
    }


def mean_of(means: Sequence[Mean]) -> float | None:
    """Mean over tasks; ``None`` unless all of them have one."""
    known = [one.percent for one in means if one.percent is not None]
    return fmean(known) if known and len(known) == len(means) else None


def means_table(folder: RunFolder, means: Means, title: str = "score") -> str:
    """Variants down, tasks and their mean across, with notes."""
    several = len(folder.tasks) > 1
    rows = []
    for variant, by_task in means.items():
        of_tasks = list(by_task.values())
        rows.append((variant, *(one.percent for one in of_tasks), *([mean_of(of_tasks)] if several else [])))
    titles = (title, *folder.tasks, *(["mean"] if several else []))
    return plain_table(titles, rows, notes(folder, means))


def notes(folder: RunFolder, means: Means, counted: str = "counted as 0") -> list[str]:
    """A line for samples that failed, and one for those that are not done.

    Args:
        counted: What became of failed samples in the scores.
    """
    failed, absent = [], []
    for variant, by_task in means.items():
        for task, one in by_task.items():
            asked = folder.description["tasks"][task]["samples"]
            if one.errors:
                failed.append(f"{variant} {task} {one.errors} of {one.samples}")
            if one.samples < asked:
                absent.append(f"{variant} {task} {one.samples} of {asked}")
    lines = [f"failed, {counted} (each line's 'error' says why): {', '.join(failed)}"] if failed else []
    return lines + ([f"not finished: {', '.join(absent)}"] if absent else [])


def conclude(
    folder: RunFolder | None,
    sample_scores: SampleScores,
    table: Callable[[RunFolder], str],
    draw: Callable[[RunFolder], None] | None = None,
) -> int:
    """How a benchmark's command ends: print its table, draw its picture if any.

    Args:
        folder: As ``run`` gives it; ``None`` in processes that are not the main one, which say nothing.

    Returns:
        The exit code: 1 where not one sample succeeded, else 0.
    """
    if folder is None:
        return 0
    print(table(folder))
    if draw is not None:
        draw(folder)
    every = [one for by_task in mean_scores(folder, sample_scores).values() for one in by_task.values()]
    return int(all(one.errors == one.samples for one in every))


def _mean(records: Sequence[Record], sample_scores: SampleScores, task: str) -> Mean:
    errors = sum("error" in one for one in records)
    return Mean(100 * fmean(sample_scores(task, records)) if records else None, len(records), errors)
