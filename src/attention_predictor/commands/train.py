"""Train a predictor on attention recorded by attnpred record.

The command reads and checks all documents before the first step. Every --log-every steps it validates the predictor on
held-out documents and saves the state of the run; --resume continues from there and gives the same losses as an
uninterrupted run. It keeps the predictor with the best recovery over the next --horizon steps, with a model card and
learning curves beside it. The predictor works with the block size of the recording only. Given recordings of several
models, it trains one predictor for all of them.

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
from pathlib import Path

from attention_predictor.arguments import add_option, check_output, refused
from attention_predictor.train.options import LOSSES, NUMBERS, PRECISIONS, TARGETS, TRACKERS, TrainOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = TrainOptions()
    add = parser.add_argument
    what = "directory written by attnpred record; several recordings count equally"
    add("--data", required=True, action="append", metavar="DIR", help=what)
    add("--out", required=True, metavar="CKPT", help="directory for the predictor")
    add(
        "--arch",
        default=default.arch,
        choices=sorted(TARGETS),
        help="architecture of the predictor (default: %(default)s)",
    )
    add("--init", metavar="CKPT", help="start from this predictor; it must have the same architecture")
    add(
        "--loss",
        default=default.loss,
        choices=LOSSES,
        help="ce: cross-entropy; mse: squared error (default: %(default)s)",
    )
    for name, says in (
        ("horizon", "predict a block's largest mass in the next N steps"),
        ("steps", "number of optimiser steps"),
        ("batch", "records per step; a record is one KV head of one layer"),
        ("lr", "largest learning rate"),
        ("seed", "random seed"),
        ("val_fraction", "share of texts held out, if the recording defines no validation set"),
        ("log_every", "steps between validations"),
    ):
        add_option(parser, "--" + name.replace("_", "-"), NUMBERS[name], getattr(default, name), says)
    add(
        "--precision",
        default=default.precision,
        choices=PRECISIONS,
        help="number type of the network; no: fp32 (default: %(default)s)",
    )
    add(
        "--device",
        default="auto",
        metavar="D",
        help="cpu, or auto: the device that accelerate finds (default: %(default)s)",
    )
    add("--tracker", default="none", choices=TRACKERS, help="log metrics to this service too (default: %(default)s)")
    add("--resume", action="store_true", help="continue the unfinished run in CKPT; keep a finished predictor")
    add("--json", action="store_true", help="print all metrics as one JSON object")


def check(args: argparse.Namespace) -> None:
    for option, given in (*(("--data", one) for one in args.data), ("--out", args.out)):
        if not given:
            raise refused(option, given, "the name of a directory")
    check_output("--out", Path(args.out), folder=True)
    TrainOptions.of(args)
