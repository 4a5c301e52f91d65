"""Mean scores of a run by variant and task, and the notes below a table: failed and missing samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from attention_predictor.eval.display.heatmap import FILE, draw_heatmaps
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.run_folder import RunFolder

NAMED = 3  # a variant's tasks that a note names; of more it gives the sum


@dataclass(frozen=True)
class Mean:
    """Mean score of one variant's samples of one task.

    Attributes:
        value: The mean in the measure's unit; ``None`` while no sample is done.
        samples, errors, asked: Numbers of samples done, of failed ones, and of all samples of the task.
    """

    value: float | None
    samples: int
    errors: int
    asked: int


Means = Mapping[str, Mapping[str, Mean]]  # by variant and task


def mean_scores(folder: RunFolder, measure: Measure) -> dict[str, dict[str, Mean]]:
    """Mean scores of every variant and task of a run."""

    def mean(variant: str, task: str) -> Mean:
        records = folder.records(variant, task)
        value = measure.scale * fmean(measure.sample_scores(task, records)) if records else None
        errors = sum("error" in one for one in records)
        return Mean(value, len(records), errors, folder.description["tasks"][task]["samples"])

    return {variant: {task: mean(variant, task) for task in folder.tasks} for variant in folder.variants}


def mean_of(means: Sequence[Mean]) -> float | None:
    """Mean over tasks; ``None`` unless all of them have one."""
    known = [one.value for one in means if one.value is not None]
    return fmean(known) if known and len(known) == len(means) else None


def means_table(folder: RunFolder, measure: Measure) -> str:
    """Variants down, tasks and their mean across, with notes."""
    means, several = mean_scores(folder, measure), len(folder.tasks) > 1
    rows = []
    for variant, by_task in means.items():
        of_tasks = list(by_task.values())
        rows.append((variant, *(one.value for one in of_tasks), *([mean_of(of_tasks)] if several else [])))
    titles = (measure.what, *folder.tasks, *(["mean"] if several else []))
    return text_table(titles, rows, notes(means, measure.failed))


def notes(
    means: Means,
    failed: str,
    *,
    where: str = " (each line's 'error' says why)",
    unfinished: str = "not finished",
) -> list[str]:
    """A line for failed samples, and one for samples not done yet.

    Args:
        failed: How failed samples count.
    """
    errors, absent = [], []
    for variant, tasks in means.items():
        errors += _parts(variant, {task: (one.errors, one.samples) for task, one in tasks.items() if one.errors})
        few = {task: (one.samples, one.asked) for task, one in tasks.items() if one.samples < one.asked}
        absent += _parts(variant, few)
    lines = [f"failed, {failed}{where}: {', '.join(errors)}"] if errors else []
    return lines + ([f"{unfinished}: {', '.join(absent)}"] if absent else [])


def _parts(variant: str, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """How many samples of how many, by task, or of all tasks together if they are more than ``NAMED``."""
    if len(counts) <= NAMED:
        return [f"{variant} {task} {some} of {every}" for task, (some, every) in counts.items()]
    some, every = (sum(each) for each in zip(*counts.values(), strict=True))
    return [f"{variant} {some} of {every} in {len(counts)} tasks"]


def show_results(
    folder: RunFolder | None,
    measure: Measure,
    table: Callable[[RunFolder, Measure], str] = means_table,
    *,
    plot: bool = False,
) -> int:
    """Print a run's table and, with ``plot``, draw its heat maps into its directory.

    Args:
        folder: The result of ``run``; ``None`` in processes other than the main one, which print nothing.

    Returns:
        The exit code: 1 if every sample failed, else 0.
    """
    if folder is None:
        return 0
    print(table(folder, measure))
    if plot and (maps := measure.heat_maps(folder)) is not None:
        draw_heatmaps(maps, folder.path / FILE)
    every = [one for by_task in mean_scores(folder, measure).values() for one in by_task.values()]
    return int(all(one.errors == one.samples for one in every))
