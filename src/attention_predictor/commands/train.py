"""Train a predictor on recorded histories (attnpred record makes them).

All documents are read and checked before the first step. Every --log-every steps the predictor is judged on held-out
documents, and the state of the run is saved: --resume goes on from there, to the same losses. The best predictor is
kept, by recovery over the steps that it is trained for. Recordings of several models train one predictor for all. A
card and learning curves lie beside it. It is for the block size of the recording.

examples:
  attnpred train --data recordings/ --out my-predictor/
  attnpred train --data llama/ --data qwen/ --out for-other-models/
  attnpred train --data recordings/ --out published/ --arch paper --loss mse \\
      --horizon 1
  accelerate launch --multi_gpu -m attention_predictor.cli train \\
      --data recordings/ --out my-predictor/ --precision bf16
"""

from __future__ import annotations

import argparse

from attention_predictor.arguments import add_option
from attention_predictor.train.options import LOSSES, NUMBERS, PRECISIONS, TARGETS, TRACKERS, TrainOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = TrainOptions()
    add = parser.add_argument
    what = "directory that attnpred record wrote; given several times, each counts equally"
    add("--data", required=True, action="append", metavar="DIR", help=what)
    add("--out", required=True, metavar="CKPT", help="directory to save the predictor to")
    add("--arch", default=default.arch, choices=sorted(TARGETS), help="architecture (%(default)s)")
    add("--init", metavar="CKPT", help="start from this predictor, of the same architecture")
    add("--loss", default=default.loss, choices=LOSSES, help="cross-entropy or squared error (%(default)s)")
    for name, says in (
        ("horizon", "steps whose largest mass is the target"),
        ("steps", "optimiser steps"),
        ("batch", "records (layer, KV head) a step"),
        ("lr", "largest learning rate"),
        ("seed", "seed of everything random"),
        ("val_fraction", "share held out where DIR names none"),
        ("log_every", "steps between validations"),
    ):
        add_option(parser, "--" + name.replace("_", "-"), NUMBERS[name], getattr(default, name), says)
    add("--precision", default=default.precision, choices=PRECISIONS, help="of the network (%(default)s: fp32)")
    add("--device", default="auto", metavar="D", help="auto, what accelerate finds, or cpu (%(default)s)")
    add("--tracker", default="none", choices=TRACKERS, help="where figures go besides CKPT (%(default)s)")
    add("--resume", action="store_true", help="go on with an unfinished run in CKPT")
    add("--json", action="store_true", help="print all figures as one JSON object")


def check(args: argparse.Namespace) -> None:
    TrainOptions.of(args)
