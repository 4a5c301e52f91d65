"""RULER: needles, variable tracking, counting of words, and questions, at any length (arXiv 2404.06654).

Samples are made here, by seed: prompt and longest answer together have the length asked for, in the model's own
tokens. Parameters, scores and the beginning of the answer at the end of each prompt are RULER's, words and noise are
ours. Essays for five of the niah tasks come from --haystack. Questions come from --squad (qa_1) and --hotpotqa (qa_2),
files with a line of JSON for each: question, answers, context; without them these tasks are left out.

--data runs samples that RULER has made, input and outputs in each line, from <task>.jsonl or a directory of such
files.

The score is the share of reference answers that the prediction contains; for questions, whether it contains any.

examples:
  attnpred eval ruler --haystack essays/ --lengths 4096,8192 --no-chat --samples 20 --out runs/ruler \\
      --policies full,quest,predictor --budgets 512,1024
  attnpred eval ruler --data ruler/4096/niah_multikey_3.jsonl --model meta-llama/Llama-3.1-8B-Instruct --out runs/mk3
  attnpred eval ruler --tasks vt,fwe --lengths 131072 --model Qwen/Qwen2.5-7B-Instruct-1M --out runs/ruler-128k
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from attention_predictor.arguments import whole_numbers
from attention_predictor.eval.filled import Haystack
from attention_predictor.eval.folder import RunFolder
from attention_predictor.eval.means import Means, conclude, mean_scores, notes
from attention_predictor.eval.plain_table import plain_table
from attention_predictor.eval.processes import Processes
from attention_predictor.eval.prompts import context_length
from attention_predictor.eval.ruler.base import WORDINGS, Sources
from attention_predictor.eval.ruler.benchmark import GivenRuler, MadeRuler, find_files
from attention_predictor.eval.ruler.families import FAMILIES, choose_families
from attention_predictor.eval.ruler.passages import Passages
from attention_predictor.eval.ruler.questions import QA_OPTIONS
from attention_predictor.eval.ruler.scorer import AT, family_name, sample_scores
from attention_predictor.eval.runner import Benchmark, Plan, add_run_arguments, run
from attention_predictor.eval.tasks import read_texts
from attention_predictor.loading import load_tokenizer
from attention_predictor.predictor.errors import ConfigError

LENGTHS, SAMPLES = "4096", 100
MAKING = (
    "lengths",
    "samples",
    "haystack",
    "squad",
    "hotpotqa",
    "wording",
)  # options that --data leaves nothing to do for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add = parser.add_argument
    add("--tasks", default="all", metavar="T,T", help=f"all (%(default)s) or some of {','.join(FAMILIES)}")
    add("--lengths", metavar="N,N", help=f"tokens of prompt and answer ({LENGTHS})")
    add("--samples", type=int, metavar="N", help=f"of each task and length ({SAMPLES})")
    add("--haystack", type=Path, metavar="D", help="essays: .txt file or directory of them")
    add("--squad", type=Path, metavar="F", help="jsonl of questions, for qa_1")
    add("--hotpotqa", type=Path, metavar="F", help="jsonl of questions, for qa_2")
    what = f"{WORDINGS[0]} (default), or {WORDINGS[1]}: niah as the pocket model has learned to be asked"
    add("--wording", choices=WORDINGS, help=what)
    add("--data", type=Path, metavar="D", help="samples made by RULER: <task>.jsonl or directory of them")
    add("--no-chat", dest="chat", action="store_false", help="don't put prompts into the chat template")


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    return conclude(run(make_benchmark(args), plan), sample_scores, folder_table)


def make_benchmark(args: argparse.Namespace) -> Benchmark:
    families = choose_families(args.tasks)
    context = context_length(args.model)
    if args.data is not None:
        if given := [name for name in MAKING if getattr(args, name) is not None]:
            raise ConfigError(f"--{given[0]} is for samples made here, not for those of --data")
        files = find_files(args.data, None if args.tasks == "all" else families)
        return GivenRuler(load_tokenizer(args.model), files, chat=args.chat, context=context)
    passages = {task: Passages(path) for task, path in (("qa_1", args.squad), ("qa_2", args.hotpotqa)) if path}
    if args.tasks == "all" and (absent := [name for name in QA_OPTIONS if name not in passages]):
        if Processes().is_main:
            print(f"left out: {', '.join(f'{name}, which needs {QA_OPTIONS[name]}' for name in absent)}")
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


def folder_table(folder: RunFolder) -> str:
    """A run's scores in percent: variants and lengths down, tasks and their mean across, with notes."""
    means = mean_scores(folder, sample_scores)
    families = [name for name in FAMILIES if any(family_name(task) == name for task in folder.tasks)]
    lengths = sorted({task.partition(AT)[2] for task in folder.tasks}, key=lambda length: int(length or 0))
    rows = [_row(means, variant, length, families) for variant in folder.variants for length in lengths]
    return plain_table(("score, %", *families, "mean"), rows, notes(folder, means))


def _row(means: Means, variant: str, length: str, families: list[str]) -> tuple[object, ...]:
    by_family = {family_name(task): one for task, one in means[variant].items() if task.partition(AT)[2] == length}
    percents = [by_family[name].percent if name in by_family else None for name in families]
    known = [percent for percent in percents if percent is not None]
    mean = fmean(known) if len(known) == len(families) else None
    return (f"{variant} {length}".rstrip(), *percents, mean)
