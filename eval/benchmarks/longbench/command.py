"""``attnpred eval longbench``: options, run, table, and measures for the report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.longbench.benchmark import LongBench
from attention_predictor.eval.benchmarks.longbench.data import open_source
from attention_predictor.eval.benchmarks.longbench.scorer import (
    BUCKETS,
    ENGLISH,
    answer_bits,
    sample_scores,
    score_folder,
)
from attention_predictor.eval.benchmarks.longbench.table import folder_table
from attention_predictor.eval.benchmarks.longbench.tasks import (
    ALL,
    CATEGORIES,
    TASKS,
    check_names,
    check_scorers,
    choose_tasks,
    without_unscorable,
)
from attention_predictor.eval.harness.measure import Column, Description, Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.prompts import context_length
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, run
from attention_predictor.loading import load_tokenizer
from attention_predictor.reading import check_unicode, read_json


def columns_of(tasks: Sequence[str]) -> list[Column]:
    """A column for each task and category, and the average that papers report."""
    columns = [Column(task, (task,)) for task in tasks]
    for category in CATEGORIES:
        if inside := tuple(task for task in tasks if TASKS[task].category == category):
            columns.append(Column(category, inside, average=True))
    if set(ENGLISH) <= set(tasks):
        columns.append(Column("16 English tasks", ENGLISH, average=True))
    if set(TASKS) <= set(tasks):
        columns.append(Column(f"{len(TASKS)} tasks", tuple(TASKS), average=True))
    return columns


MEASURE = Measure("LongBench", "score", sample_scores, rounded=True, columns=columns_of)
# Scores of small models are near zero; the likelihood of the reference answers still tells policies apart.
ANSWERS = Measure(
    *("LongBench's answers", "bits a token, less is better", answer_bits),
    scale=1.0,
    higher=False,
    bounds=(0.0, math.inf),
    weight=lambda record: float(record.get("answer_tokens", 0)),
    failed="left out of the figures",
    traffic=False,
    columns=columns_of,
)


def measures(description: Description) -> list[Measure]:
    """Scores; of LongBench-E one table for each length; the answers' likelihood where a run recorded it."""
    settings, found = description["settings"], [MEASURE]
    if settings.get("extended"):
        found = [
            replace(MEASURE, title="LongBench-E", part=name, within=_of_length(least, below))
            for name, (least, below) in BUCKETS.items()
        ]
    return found + ([ANSWERS] if settings.get("answer_likelihood") else [])


def _of_length(least: int, below: float) -> Callable[[Record], bool]:
    return lambda record: least <= record["length"] < below


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    tasks = choose_tasks(args.tasks, extended=args.e)
    _check_max_length(args.max_length, args.model, tasks)
    if args.tasks == ALL:
        tasks, left_out = without_unscorable(tasks)
        if left_out and Processes().is_main:
            print(left_out)
    if (done := RunFolder(plan.out)).description:
        check_scorers([task for task in done.tasks if task in TASKS])  # their scores go into the table too
    benchmark = LongBench(
        load_tokenizer(args.model),
        open_source(args.data),
        tasks,
        extended=args.e,
        chat=args.chat,
        max_length=args.max_length,
        templates=_read_templates(args.templates),
        answer_likelihood=args.answer_perplexity,
    )
    folder = run(benchmark, plan)
    if folder is None:
        return 0
    scores = score_folder(folder)
    print(folder_table(folder, scores))
    return 1 if all(one.errors == one.samples for one in scores.values()) else 0


def _check_max_length(max_length: int | None, model: str | None, tasks: tuple[str, ...]) -> None:
    if max_length is None:
        return
    context = context_length(str(model))
    longest = max(TASKS[task].max_new_tokens for task in tasks)
    if max_length < 2 or (context is not None and max_length > context - longest):
        room = "" if context is None else f" to {context - longest}, the model's {context} less {longest} of an answer"
        raise ConfigError(f"--max-length {max_length}: expected 2{room or ' or more'}")


def _read_templates(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        templates = read_json(path)
    except DataError as error:
        raise ConfigError(f"--templates {path} can't be read as JSON: {error}") from error
    if not isinstance(templates, dict) or not all(isinstance(one, str) for one in templates.values()):
        raise ConfigError(f"--templates {path}: expected an object of texts, one for each task")
    check_names(list(templates))
    for name, template in templates.items():
        check_unicode(template, f"--templates {path}, {name!r}")
    return templates
