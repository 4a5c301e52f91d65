"""Tables of results: policies by budget down, tasks and averages across.

Runs of one benchmark whose settings, samples and variants agree share a table; others get one each.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from attention_predictor.commands import EVAL
from attention_predictor.errors import AttentionPredictorError, ConfigError, DataError
from attention_predictor.eval.harness.bootstrap import interval, resampled_means
from attention_predictor.eval.harness.measure import Column, Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.scores import Mean, notes

SHOWN = ".2f"  # format of scores
ORACLE = "oracle"  # the policy that selects by the truth
BENCHMARKS = {name: command for name, command in EVAL.items() if name != "several"}


@dataclass(frozen=True)
class TaskResults:
    """One variant's samples of one task.

    Attributes:
        scores: Score and weight by sample id; samples that do not count are left out.
        samples, errors, asked: Numbers of samples done, of failed ones, and of all samples of the task.
    """

    scores: Mapping[str, tuple[float, float]]
    samples: int
    errors: int
    asked: int

    @classmethod
    def of(cls, measure: Measure, task: str, records: Sequence[Record], asked: int) -> TaskResults:
        """Results from a run's records."""
        found = measure.sample_scores(task, records)
        scores = {
            str(one["id"]): (score, measure.weight(one))
            for one, score in zip(records, found, strict=True)
            if not math.isnan(score) and (measure.within is None or measure.within(one))
        }
        return cls(scores, len(records), sum(bool(one.get("error")) for one in records), asked)

    def arrays(self, ids: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """``scores_N, weights_N`` of samples, float64."""
        pairs = np.array([self.scores[one] for one in ids], dtype=np.float64)
        return pairs[:, 0], pairs[:, 1]


@dataclass(frozen=True)
class Row:
    """A variant: a policy at a budget.

    Attributes:
        policy: The rule's name.
        budget: Tokens; ``None`` for a policy that attends to everything.
        can_be_best: Whether it can be the best; full attention and the oracle can't.
        outcomes: Results by task.
        hit_rate: Mean over samples, from 0 to 1; ``None`` without an engine.
        fetched_bytes: Mean of a decoding step over all samples; ``None`` without an engine.
        over_steps: Both by step (``StepSeries.record``), for each sample that has them.
    """

    name: str
    policy: str
    budget: int | None
    stock: bool
    can_be_best: bool
    outcomes: Mapping[str, TaskResults]
    hit_rate: float | None
    fetched_bytes: float | None
    over_steps: Sequence[Record]


@dataclass(frozen=True)
class Cell:
    """A cell: its value, its difference to full attention, and both intervals.

    ``best``: no other policy is better at this budget, and there is another one.
    """

    value: float
    interval: tuple[float, float] | None
    delta: float | None
    delta_interval: tuple[float, float] | None
    best: bool = False


@dataclass(frozen=True)
class ResultsTable:
    """The table of runs that can be compared.

    Attributes:
        title: Benchmark and model.
        notes: Failed and missing samples, and results present in two runs.
    """

    title: str
    measure: Measure
    folders: Sequence[RunFolder]
    rows: Sequence[Row]
    columns: Sequence[Column]
    notes: Sequence[str]
    seed: int
    # A task's mean is part of several columns.
    _task_means: dict[tuple[str, str, tuple[str, ...]], tuple[float, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def full(self) -> Row | None:
        """The row that other rows are compared with."""
        whole = [row for row in self.rows if row.budget is None]
        return next((row for row in whole if row.stock), whole[0] if whole else None)

    @cached_property
    def figures(self) -> dict[tuple[str, str], Cell]:
        """Cells by names of row and column; absent where a task of the column has no results."""
        found: dict[tuple[str, str], Cell] = {}
        for row in self.rows:
            for column in self.columns:
                if (figure := self._figure(row, column)) is not None:
                    found[row.name, column.title] = figure
        for column in self.columns:
            for budget in {row.budget for row in self.rows if row.budget is not None}:
                names = [
                    row.name
                    for row in self.rows
                    if row.can_be_best and row.budget == budget and (row.name, column.title) in found
                ]
                shown = {name: float(format(found[name, column.title].value, SHOWN)) for name in names}
                best = max(shown.values(), default=0.0) if self.measure.higher else min(shown.values(), default=0.0)
                for name in names if len(names) > 1 else ():
                    if shown[name] == best:
                        found[name, column.title] = replace(found[name, column.title], best=True)
        return found

    def _figure(self, row: Row, column: Column) -> Cell | None:
        outcomes = [row.outcomes.get(task) for task in column.tasks]
        if not all(one is not None and one.scores for one in outcomes):
            return None
        own = {task: list(row.outcomes[task].scores) for task in column.tasks}
        value, means_R = self._mean(row, own)
        several = all(len(ids) > 1 for ids in own.values())  # one sample says nothing of its task's spread
        between = interval(means_R) if several else None
        full = self.full
        if full is None or full is row or not set(column.tasks) <= set(full.outcomes):
            return Cell(value, between, None, None)
        both = {task: [one for one in ids if one in full.outcomes[task].scores] for task, ids in own.items()}
        if not all(both.values()):
            return Cell(value, between, None, None)
        paired = all(len(ids) > 1 for ids in both.values())
        (mine, mine_R), (theirs, theirs_R) = self._mean(row, both), self._mean(full, both)
        return Cell(value, between, mine - theirs, interval(mine_R - theirs_R) if paired else None)

    def _mean(self, row: Row, ids: Mapping[str, Sequence[str]]) -> tuple[float, np.ndarray]:
        """Mean over tasks of the named samples, and its resampled means."""
        values, resampled = [], []
        for task, names in ids.items():
            value, means_R = self._task_mean(row, task, tuple(names))
            values.append(value)
            resampled.append(means_R)
        mean = fmean(values)
        return round(mean, 2) if self.measure.rounded else mean, np.mean(resampled, axis=0)

    def _task_mean(self, row: Row, task: str, ids: tuple[str, ...]) -> tuple[float, np.ndarray]:
        if (known := self._task_means.get((row.name, task, ids))) is not None:
            return known
        scores_N, weights_N = row.outcomes[task].arrays(ids)
        total = 0.0
        for score, weight in zip(scores_N.tolist(), weights_N.tolist(), strict=True):  # in the official scorer's order
            total += score * weight
        mean = self.measure.scale * total / float(weights_N.sum())
        means_R = self.measure.scale * resampled_means(scores_N, weights_N, seed=(self.seed, *task.encode()))
        found = (round(mean, 2) if self.measure.rounded else mean, means_R)
        self._task_means[row.name, task, ids] = found
        return found


def make_tables(paths: Sequence[Path], seed: int = 0) -> list[ResultsTable]:
    """Read runs, each table in the order of its first run.

    Raises:
        ConfigError: A directory is given twice, is missing or no run's, or its benchmark is unknown.
        DataError: A run has no results yet, or results are of the wrong form.
    """
    groups: list[list[RunFolder]] = []
    seen: dict[Path, Path] = {}
    for path in paths:
        if (known := seen.setdefault(path.resolve(), path)) is not path:
            raise ConfigError(f"{path} is given twice" + (f", once as {known}" if known != path else ""))
        if not path.is_dir():
            raise ConfigError(f"{path}: no such directory")
        folder = RunFolder.finished(path)
        if (found := folder.description["benchmark"]) not in BENCHMARKS:
            raise ConfigError(f"{path} is a run of {found!r}: expected one of {', '.join(BENCHMARKS)}")
        if not any(folder.records(variant, task) for variant in folder.variants for task in folder.tasks):
            raise DataError(f"{path}: no results in this run yet")
        for group in groups:
            if all(_agree(folder, other) for other in group):
                group.append(folder)
                break
        else:
            groups.append([folder])
    tables = [table for group in groups for table in _tables_of(group, seed)]
    titles = Counter(table.title for table in tables)
    return [_told_apart(table) if titles[table.title] > 1 else table for table in tables]


def _told_apart(table: ResultsTable) -> ResultsTable:
    return replace(table, title=f"{table.title} · {', '.join(str(folder.path) for folder in table.folders)}")


def _agree(one: RunFolder, other: RunFolder) -> bool:
    mine, theirs = one.description, other.description
    for name in ("tasks", "variants"):
        both = set(mine[name]) & set(theirs[name])
        if any(mine[name][key] != theirs[name][key] for key in both):
            return False
    return all(mine[name] == theirs[name] for name in ("benchmark", "settings"))


def _tables_of(folders: Sequence[RunFolder], seed: int) -> list[ResultsTable]:
    """One for each measure of the benchmark; those without any score are left out, unless all are."""
    description = folders[0].description
    benchmark = importlib.import_module(f"attention_predictor.{BENCHMARKS[description['benchmark']].main}")
    measures = benchmark.measures(description) if hasattr(benchmark, "measures") else [benchmark.MEASURE]
    made = [_table_of(folders, seed, measure) for measure in measures]
    scored = [table for table in made if any(one.scores for row in table.rows for one in row.outcomes.values())]
    return scored or made[:1]


def _table_of(folders: Sequence[RunFolder], seed: int, measure: Measure) -> ResultsTable:
    first = folders[0].description
    rows, twice = [], []
    variants = {name: one for folder in folders for name, one in folder.description["variants"].items()}
    tasks = {name: one for folder in folders for name, one in folder.description["tasks"].items()}
    for name, variant in variants.items():
        outcomes, every = {}, []
        for task, known in tasks.items():
            having = [(folder, found) for folder in folders if (found := folder.records(name, task))]
            if not having:
                outcomes[task] = TaskResults({}, 0, 0, known["samples"])
                continue
            folder, records = having[0]
            twice += [f"{name} {task}"] if len(having) > 1 else []
            try:
                outcomes[task] = TaskResults.of(measure, task, records, known["samples"])
            except AttentionPredictorError:  # says more already
                raise
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
                where = folder.results(name, task)
                raise DataError(f"{where}: not results of {first['benchmark']}: {error!r}") from error
            inside = measure.within or (lambda record: True)
            every += [one for one in records if not one.get("error") and inside(one)]
        rows.append(_row(name, variant, outcomes, every))
    rows.sort(key=lambda row: (row.budget is not None, row.budget or 0, not row.stock))
    model = Path(str(first["settings"].get("model", ""))).name
    title = " · ".join(filter(None, [measure.title, measure.part, model]))
    means = {
        row.name: {task: Mean(None, one.samples, one.errors, one.asked) for task, one in row.outcomes.items()}
        for row in rows
    }
    absent = "not finished (differences are over samples that both have)"
    below = notes(means, measure.failed, where="", unfinished=absent)
    if twice:
        below.append(f"in more than one of the runs, taken from the first: {', '.join(twice)}")
    return ResultsTable(title, measure, folders, rows, measure.columns(list(tasks)), below, seed)


def _row(name: str, variant: Mapping[str, Any], outcomes: Mapping[str, TaskResults], records: Sequence[Record]) -> Row:
    budget = variant["budget"]
    policy = name if budget is None else name.removesuffix(f"-{budget}")
    rates = [one["hit_rate"] for one in records if one.get("hit_rate") is not None]
    steps = sum(one.get("steps") or 0 for one in records)
    fetched = sum(one.get("fetched_bytes") or 0 for one in records) / steps if steps else None
    hit_rate = fmean(rates) if rates else None
    series = [one["over_steps"] for one in records if "over_steps" in one]
    stock, can_be_best = bool(variant.get("stock")), budget is not None and variant["policy"] != ORACLE
    return Row(name, policy, budget, stock, can_be_best, outcomes, hit_rate, fetched, series)


def describe(folder: RunFolder) -> str:
    """A run's settings as indented JSON, with its last session's versions and machine."""
    known = {name: folder.description[name] for name in ("benchmark", "settings")}
    return json.dumps(known | {"last session": (folder.sessions or [{}])[-1]}, indent=1, ensure_ascii=False)
