"""LongBench: a table of scores, policies and budgets down, tasks across.

Prompts, lengths and scores are the official ones. A prompt that is too long loses its middle; --max-length 7500, say,
cuts where the authors cut for a model of 8K tokens. Prompts are put into the model's chat template, but for trec,
triviaqa, samsum, lsht, lcc and repobench-p; --no-chat puts none into it, for models that are no assistants. Each
policy sees the prompt in full and decodes the answer with its budget.

A sample that fails is kept with its error, scores 0 and is counted below the table. Run the command again, and it goes
on where it stopped.

examples:
  attnpred eval longbench --data longbench/ --no-chat --tasks qasper,trec --out runs/pocket
  attnpred eval longbench --model meta-llama/Llama-3.1-8B-Instruct --data hub --out runs/llama \\
      --policies full,streaming,snapkv,quest,predictor --budgets 512,1024,2048,4096
  attnpred eval longbench --data longbench/ --no-chat --out runs/ahead --policies full \\
      --rule "ahead: predictor,late_fetch=0" --rule "late: predictor" --budgets 256,512 --limit 20
  accelerate launch --num_processes 4 -m attention_predictor.cli eval longbench --data hub --e --out runs/e
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attention_predictor.eval.longbench.benchmark import LongBench
from attention_predictor.eval.longbench.data import open_source
from attention_predictor.eval.longbench.metrics import check_jieba
from attention_predictor.eval.longbench.scorer import score_folder
from attention_predictor.eval.longbench.table import folder_table
from attention_predictor.eval.longbench.tasks import TASKS, check_names, choose_tasks
from attention_predictor.eval.prompts import context_length
from attention_predictor.eval.runner import Plan, add_run_arguments, run
from attention_predictor.loading import load_tokenizer
from attention_predictor.predictor.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add = parser.add_argument
    what = (
        "directory of <task>.jsonl (<task>_e.jsonl with --e), hub (the authors' archive), or hub:owner/name (a mirror)"
    )
    add("--data", required=True, metavar="D", help=what)
    add("--tasks", default="all", metavar="T,T", help=f"all (%(default)s) or some of {','.join(TASKS)}")
    add("--e", action="store_true", help="LongBench-E: 13 English tasks, scored by length")
    add("--no-chat", dest="chat", action="store_false", help="don't put prompts into the chat template")
    what = "cut longer prompts in the middle (default: what the model has positions for, less the answer's)"
    add("--max-length", type=int, metavar="N", help=what)
    add("--templates", type=Path, metavar="F", help="JSON of templates by task, in place of the official ones")
    what = "also the perplexity of the reference answers: it tells small models apart where scores don't"
    add("--answer-perplexity", action="store_true", help=what)


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    tasks = choose_tasks(args.tasks, extended=args.e)
    _check_max_length(args.max_length, args.model, tasks)
    if any(TASKS[task].chinese for task in tasks):
        check_jieba()  # now, not when all is done
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
        templates = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--templates {path} can't be read as JSON: {error}") from error
    if not isinstance(templates, dict) or not all(isinstance(one, str) for one in templates.values()):
        raise ConfigError(f"--templates {path}: expected an object of texts, one for each task")
    check_names(list(templates))
    return templates
