"""Measure: what a benchmark's scores are, and how tables, reports and heat maps show them.

Every benchmark's command module has a ``MEASURE``, or ``measures(description) -> list[Measure]`` where
``attnpred report`` writes several tables of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attention_predictor.eval.display.heatmap import HeatMaps
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.run_folder import RunFolder

SampleScores = Callable[[str, Sequence[Record]], list[float]]
Description = Mapping[str, Any]  # ``RunFolder.description``


@dataclass(frozen=True)
class Column:
    """A task, or the mean over several."""

    title: str
    tasks: tuple[str, ...]
    average: bool = False


def tasks_and_mean(tasks: Sequence[str]) -> list[Column]:
    """A column for each task and, for more than one, their mean."""
    columns = [Column(task, (task,)) for task in tasks]
    return columns + ([Column("mean", tuple(tasks), average=True)] if len(tasks) > 1 else [])


@dataclass(frozen=True)
class Measure:
    """What the scores of a benchmark are.

    Attributes:
        title: The benchmark's title.
        what: Name and unit of a score.
        sample_scores: Scores of a task's records; NaN for a sample that does not count.
        scale: Factor from a sample's score to the unit.
        higher: Whether a higher score is better.
        rounded: Round each task before averaging, as LongBench does.
        bounds: The lowest and the highest possible score.
        weight: Weight of a sample in its task.
        failed: How failed samples count, for the footnote.
        traffic: Show hit rate and fetched bytes in the report.
        within: Which samples count; ``None`` for all.
        part: Name of those samples, part of the table's title.
        columns: Columns of the report for some tasks.
        heat_maps: Heat maps of a run; ``None`` for a benchmark, or a run, without any.
    """

    title: str
    what: str
    sample_scores: SampleScores
    scale: float = 100.0
    higher: bool = True
    rounded: bool = False
    bounds: tuple[float, float] = (0.0, 100.0)
    weight: Callable[[Record], float] = lambda record: 1.0
    failed: str = "counted as 0"
    traffic: bool = True
    within: Callable[[Record], bool] | None = None
    part: str = ""
    columns: Callable[[Sequence[str]], list[Column]] = tasks_and_mean
    heat_maps: Callable[[RunFolder], HeatMaps | None] = lambda folder: None
