"""``attnpred report``: tables and a page of runs."""

from __future__ import annotations

import argparse

from attention_predictor.commands.report import NAME
from attention_predictor.eval.report.html_page import page
from attention_predictor.eval.report.results_table import make_tables
from attention_predictor.eval.report.text_formats import latex, markdown
from attention_predictor.writing import write_atomically, writing


def main(args: argparse.Namespace) -> int:
    tables = make_tables(args.runs, args.seed)
    shown = "\n".join(map(markdown, tables))
    texts = {"md": shown, "tex": "\n".join(map(latex, tables)), "html": page(tables)}
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        write_atomically(args.out / f"{NAME}.{suffix}", text)
    print(shown)
    print(f"written: {', '.join(str(args.out / f'{NAME}.{suffix}') for suffix in texts)}")
    return 0
