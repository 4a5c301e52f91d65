"""Judge selection rules: answers found, and attention mass recovered, when question and answer are decoded sparsely.

The document is prefilled; the question and its answer are then decoded token by token under each rule, so that the
model must find its own evidence. Answers are right when greedy decoding would give every token of them. Recovery is the
share of true attention mass on the attended blocks, relative recovery its ratio to the best selection of that size.

With --tail N nothing is asked: of each document --context tokens are taken (of a .txt file the first ones, or with
--per-file from places spread over it; of a row the last ones), the last N of these are decoded, and recovery alone is
judged.

examples:
  attnpred eval recovery --data texts/ --tasks kv,facts --questions 100 --budgets 256,512 \\
      --rule full --rule streaming --rule quest --rule predictor,late_fetch=0 --rule predictor --out table.json
  attnpred eval recovery --data texts/ --rule "paper: predictor,predictor=runs/paper,calibration=exact,late_fetch=0"
  attnpred eval recovery --data longbench/qasper.jsonl --tail 128 --documents 20 --rule predictor,late_fetch=0
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from attention_predictor.arguments import add_model_arguments, whole_numbers
from attention_predictor.documents import excerpt, read_documents
from attention_predictor.eval import synthetic
from attention_predictor.eval.judge import Case, Cell, Rule, judge, markdown
from attention_predictor.eval.tasks import plant, read_texts
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.predictor import Predictor
from attention_predictor.predictor.errors import ConfigError, DataError
from attention_predictor.predictor.model import AttentionPredictor

# What decides a table, besides its rules and budgets.
SETTINGS = (
    *("model", "device", "dtype", "seed", "data", "tasks", "questions"),
    *("per_document", "tail", "documents", "per_file", "context", "recovery"),
)
TAIL_INTERVAL = 4  # steps between measurements of recovery where nothing else is judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    what = "text to plant in: .txt file or directory; with --tail, what attnpred record takes"
    add("--data", required=True, metavar="D", help=what)
    add("--tasks", default="kv,facts", help=f"of {','.join(synthetic.TASKS)} (%(default)s)")
    add("--questions", type=int, default=100, metavar="N", help="in all, rounded up to whole documents (%(default)s)")
    add("--per-document", type=int, default=20, metavar="N", help="questions a document (%(default)s)")
    add("--tail", type=int, metavar="N", help="ask nothing, decode the last N tokens taken of each document")
    add("--documents", type=int, default=20, metavar="N", help="with --tail: at most (%(default)s)")
    add("--per-file", type=int, default=1, metavar="N", help="with --tail: documents of a .txt file (%(default)s)")
    add("--context", type=int, default=8192, metavar="N", help="tokens of document and question or tail (%(default)s)")
    add("--budgets", default="256,512", metavar="N,N", help="default %(default)s")
    add("--rule", action="append", metavar="RULE", help="[name:] policy[,field=value…]; default: full and predictor")
    what = f"measure it at every N-th step (0: never, with --tail at every {TAIL_INTERVAL}th)"
    add("--recovery", type=int, default=0, metavar="N", help=what)
    what = "JSON of all cells, written after each; those done by the same rule are kept"
    add("--out", type=Path, metavar="F", help=what)


def main(args: argparse.Namespace) -> int:
    rules = [Rule.parse(text) for text in args.rule or (["full", "predictor"] if args.tail is None else ["predictor"])]
    budgets = whole_numbers("--budgets", args.budgets)
    for rule in rules:
        for budget in budgets:
            check_rule(rule, budget)
    if len({rule.name for rule in rules}) < len(rules):
        raise ConfigError(f"--rule: names must differ, got {', '.join(rule.name for rule in rules)}")
    if args.tail is not None:
        args.recovery = args.recovery or TAIL_INTERVAL
        cases = _tails(args)
    else:
        cases = _questions(args)
    model = load_model(args.model, args.device, args.dtype)
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    cells = _load(args.out, settings)
    for budget in budgets:
        for rule in rules:
            same = [cell for cell in cells if (cell.rule, cell.budget) == (rule.name, budget)]
            if any(cell.settings == rule.settings for cell in same):
                continue
            cells = [cell for cell in cells if cell not in same]  # another rule had this name
            with tqdm(total=len(cases), desc=f"{rule.name}, budget {budget}", unit="doc", disable=None) as progress:
                cell = judge(model, cases, rule, budget, measure_recovery=args.recovery, after_each=progress.update)
            cells.append(cell)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                draft = {"settings": settings, "cells": [asdict(one) for one in cells]}
                temporary = args.out.with_suffix(".tmp")
                temporary.write_text(json.dumps(draft, indent=1))
                temporary.replace(args.out)
    print(markdown(cells))
    return 0


def check_rule(rule: Rule, budget: int) -> None:
    """Refuse bad settings, and a predictor that can't be had, before anything runs."""
    config = OffloadConfig(**({"budget": budget} | rule.settings))
    if issubclass(policy_class(config.policy), Predictor):
        AttentionPredictor.from_pretrained(config.predictor, block_size=config.block_size)


def _questions(args: argparse.Namespace) -> list[Case]:
    texts = read_texts(Path(args.data))
    tokenizer = load_tokenizer(args.model)
    samples = plant(
        tokenizer,
        texts,
        tasks=args.tasks.split(","),
        documents=-(-args.questions // args.per_document),
        questions=args.per_document,
        context=args.context,
        seed=args.seed,
    )
    return [Case.of(sample, tokenizer) for sample in samples]


def _tails(args: argparse.Namespace) -> list[Case]:
    if not 1 <= args.tail < args.context:
        raise ConfigError(f"--tail {args.tail}: expected 1 to below --context {args.context}")
    documents = list(read_documents(args.data, per_file=args.per_file, limit=args.documents))
    tokenizer = load_tokenizer(args.model)
    cases = [Case(excerpt(document, tokenizer, args.context, args.tail)) for document in documents]
    long = [case for case in cases if len(case.excerpt.prompt) + args.tail == args.context]
    if not long:
        raise DataError(f"--data {args.data}: no document has {args.context} tokens (--context)")
    if short := len(cases) - len(long):
        print(f"{short} of {len(cases)} documents have fewer than {args.context} tokens and are left out")
    return long


def _load(path: Path | None, settings: dict[str, str]) -> list[Cell]:
    """Cells of an earlier run with the same settings."""
    if path is None or not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        before, cells = dict(saved["settings"]), [Cell(**one) for one in saved["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out {path} is not a table of this command: {error}") from error
    if before != settings:
        differing = [key for key in before | settings if before.get(key) != settings.get(key)]
        raise ConfigError(f"--out {path} holds a table of other settings ({', '.join(differing)}): choose another file")
    return cells
