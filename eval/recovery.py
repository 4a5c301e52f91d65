"""Judge selection rules: answers found, and attention mass recovered, when question and answer are decoded sparsely.

The document is prefilled; the question and its answer are then decoded token by token under each rule, so that the
model must find its own evidence. Answers are right when greedy decoding would give every token of them. Recovery is the
share of true attention mass on the attended blocks, relative recovery its ratio to the best selection of that size.

With --tail N nothing is asked: the last N tokens of each document are decoded, and recovery alone is judged.

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
from attention_predictor.predictor.errors import ConfigError, DataError

TAIL_INTERVAL = 4  # steps between measurements of recovery where nothing else is judged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    what = "text to plant in: .txt file or directory; with --tail, what attnpred record takes"
    parser.add_argument("--data", required=True, metavar="D", help=what)
    parser.add_argument("--tasks", default="kv,facts", help=f"of {','.join(synthetic.TASKS)} (%(default)s)")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--per-document", type=int, default=20, metavar="N", help="questions a document (%(default)s)")
    parser.add_argument("--tail", type=int, metavar="N", help="ask nothing, decode the last N tokens of each document")
    parser.add_argument("--documents", type=int, default=20, metavar="N", help="with --tail: at most (%(default)s)")
    parser.add_argument("--per-file", type=int, default=1, metavar="N", help="documents a .txt file (%(default)s)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of document and question")
    parser.add_argument("--budgets", default="256,512", metavar="N,N", help="default %(default)s")
    parser.add_argument(
        "--rule", action="append", metavar="RULE", help="[name:] policy[,field=value…]; default: full and predictor"
    )
    parser.add_argument("--recovery", type=int, default=0, metavar="N", help="measure it at every N-th step (0: never)")
    parser.add_argument(
        "--out", type=Path, metavar="F", help="JSON of all cells, written after each; done cells are kept"
    )


def main(args: argparse.Namespace) -> int:
    rules = [Rule.parse(text) for text in args.rule or (["full", "predictor"] if args.tail is None else ["predictor"])]
    budgets = whole_numbers("--budgets", args.budgets)
    for rule in rules:
        for budget in budgets:
            OffloadConfig(**({"budget": budget} | rule.settings))  # refuse bad settings before anything runs
    if args.tail is not None:
        args.recovery = args.recovery or TAIL_INTERVAL
        cases = _tails(args)
    else:
        cases = _questions(args)
    model = load_model(args.model, args.device, args.dtype)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "out", "rule", "budgets")}
    cells = _load(args.out, settings)
    for budget in budgets:
        for rule in rules:
            if any(cell.rule == rule.name and cell.budget == budget for cell in cells):
                continue
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
        cells = [Cell(**one) for one in saved["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out {path} is not a table of this command: {error}") from error
    if saved["settings"] != settings:
        differing = [key for key in settings if saved["settings"].get(key) != settings[key]]
        raise ConfigError(f"--out {path} holds a table of other settings ({', '.join(differing)}): choose another file")
    return cells
