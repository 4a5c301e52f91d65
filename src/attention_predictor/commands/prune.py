"""Remove the least important layers of a model and save the rest as an ordinary model.

Layers are scored on texts. Block influence (bi) is 1 - the cosine of a layer's input and output. Query similarity
(q_similarity) is the mean cosine between a head's last 32 queries. --metric decides which layer goes first: bi removes
the lowest bi (ShortGPT), qsim the highest q_similarity, tappa the lowest bi + beta (1 - q_similarity), with both scaled
to 0..1 (TAPPA).

--out gets weights, configuration, tokenizer and scores.json, which lists all scores, the full order and the removed
layers. With --sweep the command saves no model: it measures perplexity on other texts without 1, 2, ... N layers, for
every metric and for random orders, and writes sweep.json.

examples:
  attnpred prune --model meta-llama/Llama-3.1-8B --data texts/ --layers 4 \\
      --metric tappa --beta 0.3 --out pruned
  attnpred prune --model M --layers 6 --scores pruned/scores.json --out pruned-6
  attnpred prune --plan-only --scores pruned/scores.json --metric bi
  attnpred prune --data texts/ --layers 7 --sweep heldout/ --plot sweep.png \\
      --out runs/sweep
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import PACKED, add_model_arguments, add_option, check_model_arguments, check_output
from attention_predictor.errors import ConfigError
from attention_predictor.eval.analysis.pruning.plan import BETA, METRICS
from attention_predictor.eval.display.plots import check_plot
from attention_predictor.kinds import number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add_option(parser, "--layers", whole(), None, "number of layers to remove; with --sweep: the largest number")
    add(
        "--metric",
        default="tappa",
        metavar="NAME",
        help=f"order of removal: {', '.join(METRICS)} (default: %(default)s)",
    )
    beta = number("a number from 0 on", lambda value: value >= 0, "B")
    add_option(parser, "--beta", beta, BETA, "weight of 1 - q_similarity in the metric tappa")
    add("--data", metavar="D", help="texts to score layers on, in any form that attnpred record takes")
    add_option(parser, "--documents", whole(1), 16, "most documents of each data set")
    add_option(parser, "--context", whole(), 2048, "tokens taken of each document")
    what = "read layer scores from this file instead of --data: a scores.json, or a file published by TAPPA's authors;"
    what += " repeat it if bi and q_similarity are in two files"
    add("--scores", type=Path, action="append", default=[], metavar="F", help=what)
    add("--plan-only", action="store_true", help="print the order of removal from --scores and exit")
    add("--json", action="store_true", help="print the plan as one JSON object")
    add(
        "--sweep",
        metavar="D",
        help="measure perplexity on these texts without 1 to --layers layers, instead of saving a model",
    )
    add_option(parser, "--seeds", whole(1), 5, "with --sweep: number of random orders")
    add("--plot", type=Path, metavar="F", help="with --sweep: plot perplexity into this .png, .svg or .pdf file")
    add("--out", type=Path, metavar="DIR", help="directory for the pruned model, or for sweep.json")


def check(args: argparse.Namespace) -> None:
    if args.metric not in METRICS:
        raise ConfigError(f"--metric {args.metric}: expected one of {', '.join(METRICS)}")
    if args.plan_only:
        if not args.scores:
            raise ConfigError("--plan-only needs --scores: files with bi, q_similarity or both")
        return
    if args.layers is None:
        raise ConfigError("--layers is required: the number of layers to remove")
    if args.out is None:
        raise ConfigError("--out is required: a directory for the result")
    if args.data is None and not args.scores:
        raise ConfigError("--data or --scores is required: texts to score layers by, or their scores")
    if args.data is not None and args.scores:
        raise ConfigError("--data and --scores: texts to score layers by, or their scores; give one")
    check_output("--out", args.out, folder=True)
    if (args.out / "config.json").exists():
        raise ConfigError(f"--out {args.out} holds a model already: choose another directory")
    if args.plot is not None and args.sweep is None:
        raise ConfigError("--plot needs --sweep, whose results it draws")
    check_plot(args.plot)
    check_model_arguments(args)
    if args.dtype == PACKED:
        raise ConfigError(f"--dtype {PACKED}: packed weights can't be saved")
