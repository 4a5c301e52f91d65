"""Scores of all variants as a table: policies and budgets down, tasks and averages across."""

from __future__ import annotations

from collections.abc import Mapping

from attention_predictor.eval.benchmarks.longbench.scorer import ExtendedScores, Scores
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.scores import Mean, notes


def scores_table(scores: Mapping[str, Scores], asked: Mapping[str, int]) -> str:
    """A row for each variant.

    Args:
        asked: Samples that each task should have; fewer are noted, as are failed ones.
    """
    tasks = list(dict.fromkeys(task for one in scores.values() for task in one.tasks))
    tables = [_extended(scores) if any(isinstance(one, ExtendedScores) for one in scores.values()) else _plain(scores)]
    if any(one.perplexity for one in scores.values()):
        rows = [(name, *(one.perplexity.get(task) for task in tasks)) for name, one in scores.items()]
        tables.append(text_table(("perplexity of the answer", *tasks), rows))
    return "\n".join(["\n\n".join(tables), *_notes(scores, asked)])


def folder_table(folder: RunFolder, scores: Mapping[str, Scores]) -> str:
    """A run's scores, and below them what failed or is not done."""
    return scores_table(scores, {task: known["samples"] for task, known in folder.description["tasks"].items()})


def _plain(scores: Mapping[str, Scores]) -> str:
    tasks = list(dict.fromkeys(task for one in scores.values() for task in one.tasks))
    categories = [
        name
        for name in next(iter(scores.values())).categories
        if any(one.categories[name] is not None for one in scores.values())
    ]
    rows = [
        (
            name,
            *(one.tasks.get(task) for task in tasks),
            *(one.categories[category] for category in categories),
            one.english_average,
        )
        for name, one in scores.items()
    ]
    return text_table(("score", *tasks, *categories, "16 English tasks"), rows)


def _extended(scores: Mapping[str, Scores]) -> str:
    """A row for each variant and length."""
    known = {name: one for name, one in scores.items() if isinstance(one, ExtendedScores)}
    tasks = list(dict.fromkeys(task for one in known.values() for task in one.buckets))
    rows = [
        (f"{name} {length}", *(one.buckets.get(task, {}).get(length) for task in tasks), average)
        for name, one in known.items()
        for length, average in one.averages.items()
    ]
    return text_table(("score", *tasks, "average"), rows)


def _notes(scores: Mapping[str, Scores], asked: Mapping[str, int]) -> list[str]:
    means = {
        name: {
            task: Mean(None, one.samples.get(task, 0), one.errors.get(task, 0), asked.get(task, 0))
            for task in dict.fromkeys((*one.samples, *asked))
        }
        for name, one in scores.items()
    }
    return notes(means, "counted as 0")
