"""Computes LongBench's scores from predictions, equal to the official scorer's, with counts of failed samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from attention_predictor.errors import DataError
from attention_predictor.eval.benchmarks.longbench.tasks import CATEGORIES, SYNTHETIC, TASKS, check_names
from attention_predictor.eval.harness.predictions import INDEX, Record
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.kinds import is_whole
from attention_predictor.reading import read_lines

BUCKETS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, math.inf)}  # LongBench-E: words or characters
ENGLISH = tuple(name for name, task in TASKS.items() if not task.chinese)  # the 16 tasks that papers average


@dataclass(frozen=True)
class Scores:
    """Scores of one set of predictions, in percent, with two decimals.

    Attributes:
        tasks: Scores by task.
        samples, errors: How many there were, and how many of them failed: these score 0.
        perplexity: Perplexity of the reference answers by task, where it was recorded.
    """

    tasks: Mapping[str, float]
    samples: Mapping[str, int]
    errors: Mapping[str, int]
    perplexity: Mapping[str, float] = field(default_factory=dict)

    @property
    def categories(self) -> dict[str, float | None]:
        """Mean over the tasks of a category that were scored; ``None`` where none was."""
        by_category = {
            name: [self.tasks[one] for one in self.tasks if TASKS[one].category == name] for name in CATEGORIES
        }
        return {name: round(fmean(scores), 2) if scores else None for name, scores in by_category.items()}

    @property
    def english_average(self) -> float | None:
        """Mean over the 16 English tasks; ``None`` unless all of them were scored."""
        return round(fmean(self.tasks[name] for name in ENGLISH), 2) if set(ENGLISH) <= set(self.tasks) else None

    def to_dict(self) -> dict[str, Any]:
        averages = {"categories": self.categories, "english_average": self.english_average}
        return {"tasks": dict(self.tasks)} | averages | self._besides()

    def _besides(self) -> dict[str, Any]:
        perplexity = {"answer_perplexity": dict(self.perplexity)} if self.perplexity else {}
        return {"samples": dict(self.samples), "errors": dict(self.errors)} | perplexity


@dataclass(frozen=True)
class ExtendedScores(Scores):
    """Scores of LongBench-E: ``buckets`` has each task's by length, ``None`` where no sample is that long."""

    buckets: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def averages(self) -> dict[str, float | None]:
        """Mean over tasks, by length."""
        found = {}
        for name in BUCKETS:
            known = [score for one in self.buckets.values() if (score := one[name]) is not None]
            found[name] = round(fmean(known), 2) if known else None
        return found

    def to_dict(self) -> dict[str, Any]:
        tasks = {name: dict(one) for name, one in self.buckets.items()}
        return {"tasks": tasks, "averages": self.averages} | self._besides()


def score_directory(path: Path, *, extended: bool = False) -> Scores:
    """Scores of the ``<task>.jsonl`` files of a directory.

    Raises:
        ConfigError: A file's name is no task's.
        DataError: There is none, or a line lacks a field; names file, line and field.
    """
    files = {file.name.removesuffix(".jsonl"): file for file in sorted(path.glob("*.jsonl"))}
    if not files:
        raise DataError(f"{path}: no <task>.jsonl in it" if path.is_dir() else f"{path}: no such directory")
    check_names(list(files))
    predictions = {name: read_predictions(files[name], name, extended=extended) for name in TASKS if name in files}
    return score(predictions, extended=extended)


def score_folder(folder: RunFolder, *, extended: bool = False) -> dict[str, Scores]:
    """Scores of every variant of a run; those of LongBench-E if that was run, or if asked for."""
    extended = extended or folder.description["settings"]["extended"]
    return {
        variant: score({task: folder.records(variant, task) for task in folder.tasks}, extended=extended)
        for variant in folder.variants
    }


def score(predictions: Mapping[str, Sequence[Record]], *, extended: bool = False) -> Scores:
    """Scores of predictions by task."""
    found = {name: sample_scores(name, records) for name, records in predictions.items() if records}
    samples = {name: len(predictions[name]) for name in found}
    errors = {name: sum(map(_failed, predictions[name])) for name in found}
    totals = {name: _percent(scores) for name, scores in found.items()}
    perplexity = {name: known for name in found if (known := _perplexity(predictions[name])) is not None}
    if not extended:
        return Scores(totals, samples, errors, perplexity)
    buckets = {name: _by_length(predictions[name], scores) for name, scores in found.items()}
    return ExtendedScores(totals, samples, errors, perplexity, buckets)


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Each prediction's score from 0 to 1: the best over its reference answers; 0 where there is none.

    A prediction that failed is an empty one. The classes are those of the last record, as they officially are.
    """
    what = TASKS[task]
    classes = records[-1].get("all_classes") or () if records else ()
    found = []
    for record in records:
        prediction = "" if _failed(record) else record["pred"]
        if what.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        found.append(max((what.metric(prediction, answer, classes) for answer in record["answers"]), default=0.0))
    return found


def read_predictions(path: Path, task: str, *, extended: bool = False) -> list[Record]:
    """A file of predictions, every field checked.

    Lines have an ``index``, all or none: of several lines with one index, a sample tried again, the last counts.

    Raises:
        DataError: Names file, line and field.
    """
    records: dict[int, Record] = {}
    numbered: bool | None = None
    for number, record in read_lines(path):
        where = f"{path}, line {number}"
        check_prediction(record, task, where, extended=extended)
        if numbered is not None and (INDEX in record) is not numbered:
            raise DataError(f"{where}: expected {INDEX!r} in all lines or in none; this line differs from earlier ones")
        numbered = INDEX in record
        if numbered and not is_whole(record[INDEX]):
            raise DataError(f"{where}: expected an integer in {INDEX!r}, found {record[INDEX]!r:.40}")
        records[record[INDEX] if numbered else number] = record
    if not records:
        raise DataError(f"{path}: no predictions in it")
    return [records[index] for index in sorted(records)]


def check_prediction(record: Mapping[str, Any], task: str, where: str, *, extended: bool = False) -> None:
    """``DataError`` for a field that is missing or of the wrong kind."""
    wanted = {"answers": ("a list of texts", _are_texts)}
    if not _failed(record):
        wanted["pred"] = ("a text", lambda value: isinstance(value, str))
    if TASKS[task].classes:
        wanted["all_classes"] = ("a list of texts", _are_texts)
    if extended:
        wanted["length"] = ("a number", lambda value: isinstance(value, (int, float)))
    for name, (kind, fits) in wanted.items():
        if not fits(record.get(name)):
            found = f"{record[name]!r:.40}" if name in record else f"fields {', '.join(record)}"
            raise DataError(f"{where}: expected {kind} in {name!r}, found {found}")
    if TASKS[task].category == SYNTHETIC:  # cheap metrics, and two of them look for a number in the answer
        try:
            sample_scores(task, [{"pred": "", **record}])
        except DataError as error:
            raise DataError(f"{where}, field 'answers': {error}") from error


def _failed(record: Mapping[str, Any]) -> bool:
    return bool(record.get("error"))


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _percent(scores: Sequence[float]) -> float:
    """The mean, summed and rounded in the official order, so that the last digit is the same."""
    total = 0.0
    for score in scores:  # not sum(), which compensates rounding errors from Python 3.12 on
        total += score
    return round(100 * total / len(scores), 2)


def _by_length(records: Sequence[Record], scores: Sequence[float]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, (least, below) in BUCKETS.items():
        inside = [score for score, record in zip(scores, records, strict=True) if least <= record["length"] < below]
        found[name] = float(round(100 * np.mean(inside), 2)) if inside else None  # NumPy's sum and NumPy's rounding
    return found


def answer_bits(task: str, records: Sequence[Record]) -> list[float]:
    """Bits a token of each sample's reference answer; not a number where none was recorded."""
    return [
        -record["answer_log_likelihood"] / record["answer_tokens"] / math.log(2)
        if record.get("answer_tokens")
        else math.nan
        for record in records
    ]


def _perplexity(records: Iterable[Record]) -> float | None:
    """Of all reference answers' tokens together."""
    known = [record for record in records if record.get("answer_tokens")]
    tokens = sum(record["answer_tokens"] for record in known)
    return float(np.exp(-sum(record["answer_log_likelihood"] for record in known) / tokens)) if tokens else None
