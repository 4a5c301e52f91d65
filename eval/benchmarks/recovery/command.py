"""``attnpred eval recovery``: a table of rules and budgets, each judged on questions or on tails of documents."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from attention_predictor.arguments import whole_numbers
from attention_predictor.arithmetic import ceil_div
from attention_predictor.commands.eval.recovery import TAIL_INTERVAL, rules_of
from attention_predictor.documents import excerpt, read_documents
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.recovery.judge import Case, Cell, judge, markdown
from attention_predictor.eval.benchmarks.synthetic.documents import plant, read_texts
from attention_predictor.eval.harness.variants import check_rule
from attention_predictor.loading import device_name, load_model, load_tokenizer
from attention_predictor.progress import Progress
from attention_predictor.reading import read_json
from attention_predictor.writing import json_bytes, write_atomically, writing

# What decides a table, besides its rules and budgets.
SETTINGS = (
    *("model", "device", "dtype", "seed", "data", "tasks", "questions"),
    *("per_document", "tail", "documents", "per_file", "context", "recovery"),
)


def main(args: argparse.Namespace) -> int:
    rules, budgets = rules_of(args), whole_numbers("--budgets", args.budgets)
    for rule in rules:
        for budget in budgets:
            check_rule(rule, budget)
    args.device = device_name(args.device)
    if args.tail is not None:
        args.recovery = args.recovery or TAIL_INTERVAL
        cases = _tails(args)
    else:
        cases = _questions(args)
    if args.out is not None:
        with writing(args.out):
            args.out.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, args.device, args.dtype)
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    cells = _load(args.out, settings)
    for budget in budgets:
        for rule in rules:
            same = [cell for cell in cells if (cell.rule, cell.budget) == (rule.name, budget)]
            if any(cell.settings == rule.settings for cell in same):
                continue
            cells = [cell for cell in cells if cell not in same]  # another rule had this name
            with Progress(f"{rule.name}, budget {budget}", len(cases), "documents") as progress:
                cell = judge(model, cases, rule, budget, measure_recovery=args.recovery, after_each=progress.update)
            cells.append(cell)
            if args.out is not None:
                draft = {"settings": settings, "cells": [asdict(one) for one in cells]}
                write_atomically(args.out, json_bytes(draft, indent=1))
    print(markdown(cells))
    return 0


def _questions(args: argparse.Namespace) -> list[Case]:
    texts = read_texts(Path(args.data))
    tokenizer = load_tokenizer(args.model)
    samples = plant(
        tokenizer,
        texts,
        tasks=args.tasks.split(","),
        documents=ceil_div(args.questions, args.per_document),
        questions=args.per_document,
        context=args.context,
        seed=args.seed,
    )
    return [Case.of(sample, tokenizer) for sample in samples]


def _tails(args: argparse.Namespace) -> list[Case]:
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
        saved = read_json(path)
        before, cells = dict(saved["settings"]), [Cell(**one) for one in saved["cells"]]
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out {path} is not a table of this command: {error}") from error
    if before != settings:
        differing = [key for key in before | settings if before.get(key) != settings.get(key)]
        raise ConfigError(f"--out {path} holds a table of other settings ({', '.join(differing)}): choose another file")
    return cells
