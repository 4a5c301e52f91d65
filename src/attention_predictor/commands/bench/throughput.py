"""Time decoding at growing batches, with the KV cache in CPU memory and with all of it on the device.

Every sequence of a batch has its own made-up context, as in bench decode --synthetic. Without --ways the command times
graph (on a CPU: thread) and resident, the strongest alternative; bench decode lists the other caches.

The table shows, for each context, batch and cache: tokens per second, also as a ratio to the most that the whole cache
on the device reaches at any of the batches; milliseconds per step and device memory; for this library also CPU memory,
bytes fetched and exposed wait per step. The command computes the largest batch that fits from the CPU memory of a
sequence and its measured device memory. It skips what does not fit, with a note that says why.

examples:
  attnpred bench throughput --shape llama-3.1-8b --contexts 32768,131072 \\
      --batches 1,4,8,16 --out runs/h100.jsonl --plot runs/h100.png
  attnpred bench throughput --shape llama-3.1-8b --contexts 131072 \\
      --batches 3,11,24 --host-kv int4 --late-fetch auto
  attnpred bench throughput --shape tiny --contexts 2048 --batches 1,2 \\
      --budget 256 --steps 5
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, check_output, whole_numbers
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.cache_setups import AT_FLOOR_CONTEXT, CACHE_SETUPS, names_in
from attention_predictor.eval.display.plots import check_plot
from attention_predictor.kinds import number, whole
from attention_predictor.settings import add_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser, batch=False)
    add = parser.add_argument
    add(
        "--contexts",
        default="32768,131072",
        metavar="N,N",
        help="tokens of prompt and decoded steps together (default: %(default)s)",
    )
    add("--batches", default="1,4,8,16", metavar="N,N", help="sequences per batch (default: %(default)s)")
    add_setting(parser, "host_kv")
    add_setting(parser, "late_fetch")
    add("--ways", metavar="W,W", help="caches to time: those of bench decode, except floor and static")
    add_option(parser, "--steps", whole(1), 40, "timed steps; 5 steps before and 3 after them are not timed")
    positive = number("more than 0", lambda value: value > 0, "S")
    add_option(parser, "--seconds", positive, 60.0, "stop timing a cache after this many seconds, with fewer steps")
    size = number("more than 0", lambda value: value > 0, "GIB")
    add_option(parser, "--memory-limit", size, None, "limit torch to this much device memory, in GiB")
    add(
        "--out",
        type=Path,
        metavar="F",
        help="append each result to this file as a JSON line; a later run measures only missing rows",
    )
    add("--plot", type=Path, metavar="F", help="plot tokens per second against batch into this .png, .svg or .pdf file")
    parser.set_defaults(synthetic=True)


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    for name in ("contexts", "batches"):
        whole_numbers(f"--{name}", getattr(args, name))
    named = [] if args.ways is None else names_in(args.ways)
    if floors := [name for name in named if name in AT_FLOOR_CONTEXT]:
        allowed = ", ".join(name for name in CACHE_SETUPS if name not in AT_FLOOR_CONTEXT)
        raise ConfigError(f"--ways {','.join(floors)}: its context is fixed; expected some of {allowed}")
    check_output("--out", args.out)
    check_plot(args.plot)
