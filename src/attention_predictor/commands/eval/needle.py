"""Needle in a haystack: a statement at every depth of texts of every length, and a question about it.

The haystack is text of --data, from a place on that differs from sample to sample; prompt and answer together have
the length asked for, in tokens. The needle stands behind the sentence that ends nearest its depth (0: in front of the
text, 100: near its end). An answer is right if it contains the reference, as a whole word, whatever the case.

Needles are made up for each sample, by seed: a number of a thing, a town or a trade of a person. --needles F has
others: a line of JSON each, with needle, question and answer (a text or a list of texts, one of which is enough).

Every line of OUT/<variant>/<length>.jsonl has length and depth; OUT/heatmap.png shows the grid of each variant.

examples:
  attnpred eval needle --data essays/ --no-chat --lengths 2048,4096,8192 \\
      --policies full,streaming,quest,predictor --budgets 256,512 \\
      --out runs/needle
  attnpred eval needle --data essays/ --model meta-llama/Llama-3.1-8B-Instruct \\
      --lengths 16384,32768,65536,131072 --samples 5 --budgets 1024 \\
      --depths 0,10,20,30,40,50,60,70,80,90,100 --out runs/needle-8b
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, whole_numbers
from attention_predictor.commands import run_options
from attention_predictor.eval.display.heatmap import FILE, check_heatmap
from attention_predictor.kinds import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_options.add_run_arguments(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="D", help="haystack: .txt file or directory of them")
    add("--lengths", default="2048,4096,8192", metavar="N,N", help="tokens of prompt and answer (%(default)s)")
    add("--depths", default="0,25,50,75,100", metavar="P,P", help="in percent (%(default)s)")
    add_option(parser, "--samples", whole(1), 2, "needles at each depth and length")
    add("--needles", type=Path, metavar="F", help="jsonl of needle, question, answer, in place of made-up ones")
    add("--no-chat", dest="chat", action="store_false", help="don't put prompts into the chat template")
    add("--no-plot", dest="plot", action="store_false", help=f"don't draw OUT/{FILE}")


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    for option in ("lengths", "depths"):
        whole_numbers(f"--{option}", getattr(args, option))
    check_heatmap(args.plot)
