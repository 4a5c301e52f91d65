"""``attnpred eval ruler``: options, run, table, and measures for the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean

from attention_predictor.arguments import whole_numbers
from attention_predictor.commands.eval.ruler import LENGTHS, SAMPLES
from attention_predictor.commands.eval.ruler import add_arguments as add_arguments
from attention_predictor.eval.benchmarks.haystack import Haystack
from attention_predictor.eval.benchmarks.ruler.base import WORDINGS, Sources
from attention_predictor.eval.benchmarks.ruler.benchmark import GivenRuler, MadeRuler, find_files
from attention_predictor.eval.benchmarks.ruler.families import ALL, FAMILIES, choose_families
from attention_predictor.eval.benchmarks.ruler.passages import Passages
from attention_predictor.eval.benchmarks.ruler.questions import QA_OPTIONS
from attention_predictor.eval.benchmarks.ruler.scorer import AT, family_name, sample_scores
from attention_predictor.eval.benchmarks.synthetic.documents import read_texts
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.measure import Column, Measure, tasks_and_mean
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.prompts import context_length
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Benchmark, Plan, run
from attention_predictor.eval.harness.scores import Means, mean_scores, notes, show_results
from attention_predictor.loading import load_tokenizer


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    return show_results(run(make_benchmark(args), plan), MEASURE, folder_table)


def make_benchmark(args: argparse.Namespace) -> Benchmark:
    families = choose_families(args.tasks)
    context = context_length(args.model)
    if args.data is not None:
        files = find_files(args.data, None if args.tasks == ALL else families)
        return GivenRuler(load_tokenizer(args.model), files, chat=args.chat, context=context)
    passages = {task: Passages(path) for task, path in (("qa_1", args.squad), ("qa_2", args.hotpotqa)) if path}
    if args.tasks == ALL and (absent := [name for name in QA_OPTIONS if name not in passages]):
        if Processes().is_main:
            print(f"skipped: {', '.join(f'{name}, which needs {QA_OPTIONS[name]}' for name in absent)}")
        families = tuple(name for name in families if name not in absent)
    return MadeRuler(
        load_tokenizer(args.model),
        families,
        whole_numbers("--lengths", args.lengths or LENGTHS),
        Sources(
            None if args.haystack is None else Haystack(read_texts(args.haystack)),
            passages,
            args.wording or WORDINGS[0],
        ),
        samples=SAMPLES if args.samples is None else args.samples,
        chat=args.chat,
        context=context,
        seed=args.seed,
    )


def folder_table(folder: RunFolder, measure: Measure) -> str:
    """A run's scores in percent: variants and lengths down, tasks and their mean across, with notes."""
    means = mean_scores(folder, measure)
    families = [name for name in FAMILIES if any(family_name(task) == name for task in folder.tasks)]
    lengths = sorted({task.partition(AT)[2] for task in folder.tasks}, key=lambda length: int(length or 0))
    rows = [_row(means, variant, length, families) for variant in folder.variants for length in lengths]
    return text_table(("score, %", *families, "mean"), rows, notes(means, measure.failed))


def _row(means: Means, variant: str, length: str, families: list[str]) -> tuple[object, ...]:
    by_family = {family_name(task): one for task, one in means[variant].items() if task.partition(AT)[2] == length}
    percents = [by_family[name].value if name in by_family else None for name in families]
    known = [percent for percent in percents if percent is not None]
    mean = fmean(known) if len(known) == len(families) else None
    return (f"{variant} {length}".rstrip(), *percents, mean)


def columns(tasks: Sequence[str]) -> list[Column]:
    """A column for each task, the mean at each length, and the mean of all."""
    own, means = [Column(task, (task,)) for task in tasks], tasks_and_mean(tasks)[len(tasks) :]
    lengths = list(dict.fromkeys(filter(None, (task.partition(AT)[2] for task in tasks))))
    if len({task.partition(AT)[2] for task in tasks}) > 1:
        for length in lengths:
            inside = tuple(task for task in tasks if task.partition(AT)[2] == length)
            own.append(Column(f"mean at {length}", inside, average=True))
    return own + means


MEASURE = Measure("RULER", "score, %", sample_scores, columns=columns)
