"""Needle in a haystack: hide a statement in a long text and ask for it, at several depths and lengths.

The haystack is text from --data, from a different place for each sample. Prompt and answer together have the requested
length in tokens. The needle follows the sentence that ends nearest to its depth (0: before the text, 100: near its
end). An answer is right if it contains the reference as whole words; upper and lower case don't matter.

By default each sample gets a needle generated from the seed: a number of an object, a person's town or a person's
trade. --needles reads others from a file: each line is a JSON object with needle, question and answer (one text, or a
list of accepted texts).

Every line of OUT/<variant>/<length>.jsonl has the sample's length and depth. OUT/heatmap.png shows one grid for each
variant.

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
    add("--data", type=Path, required=True, metavar="D", help="haystack: .txt file, or directory of .txt files")
    add(
        "--lengths",
        default="2048,4096,8192",
        metavar="N,N",
        help="lengths of prompt and answer together, in tokens (default: %(default)s)",
    )
    add(
        "--depths",
        default="0,25,50,75,100",
        metavar="P,P",
        help="depths of the needle, in percent of the text (default: %(default)s)",
    )
    add_option(parser, "--samples", whole(1), 2, "samples at each depth and length")
    add("--needles", type=Path, metavar="F", help=".jsonl file of needles, instead of generated ones")
    add("--no-chat", dest="chat", action="store_false", help="don't use the model's chat template")
    add("--no-plot", dest="plot", action="store_false", help=f"don't draw OUT/{FILE}")


def check(args: argparse.Namespace) -> None:
    run_options.check(args)
    whole_numbers("--lengths", args.lengths)
    whole_numbers("--depths", args.depths, least=0)
    check_heatmap(args.plot)
