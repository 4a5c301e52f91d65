"""Time a model's decoding steps after a long context, with its cache in CPU memory and with stock caches.

All caches decode the same tokens. The context is a prefill of random tokens. --synthetic skips the prefill: it fills
all caches with the same made-up keys and values, which the model's queries attend to much as to real ones. --shape
builds a model of a named shape with random weights on the device; --model loads a model.

Caches for --ways. Without --ways all are timed, except those in parentheses
and, on a CPU, those that need a GPU:
  floor           transformers' StaticCache, compiled, always 1,024 tokens:
                  the target for compiled steps
  static          transformers' StaticCache, each step one CUDA graph, always
                  1,024 tokens: the target for steps that are not compiled
  (ours)          this library with default settings
  graph           this library, each step one CUDA graph, with fused norms,
                  gated MLPs and rotary embeddings
  (graph-unfused) like graph, without fused kernels
  graph-compiled  like graph, with layers compiled by torch.compile
  thread          this library with the prefetch thread
  (no-kernels)    like thread, with torch operations only
  (resident)      the whole cache on the device, attended to by torch's
                  fastest kernels (cuDNN, flash), each step one CUDA graph:
                  the strongest alternative while it fits. A graph fixes the
                  lengths, so each step decodes another token after the same
                  prompt. On a CPU its steps are not captured
  (resident-compiled)
                  like resident, with layers compiled by torch.compile
  device          transformers' DynamicCache on the device
  offloaded       transformers' DynamicCache, offloaded layer by layer

The table shows, for each cache: milliseconds per token, median and 95th percentile; the ratio of the median to this
library's (the first of graph, ours, graph-compiled, graph-unfused, thread that was timed), to floor and to static;
memory; for this library also hit rate, bytes fetched and exposed wait. A few more steps are profiled: milliseconds by
stage, their sum, and the time in which the device was idle. A kernel that belongs to no stage has its own row. A cache
that does not fit in memory, and a stock model that can't be compiled or captured, is skipped with a note that says why.

Processes of a launcher (torchrun) divide the model by tensor parallelism; bytes and memory are those of the first.

examples:
  attnpred bench decode --context 8192 --budget 512
  attnpred bench decode --shape llama-3.1-8b --context 131072 --budget 1024 \\
      --batch 1 --synthetic --json
  attnpred bench decode --shape llama-3.1-8b --context 131072 --synthetic \\
      --ways graph,graph-unfused,graph-compiled    # what fusing gains
  attnpred bench decode --shape gpt-oss-20b --context 131072 --synthetic \\
      --ways floor,static,graph,graph-compiled
  torchrun --nproc_per_node 2 -m attention_predictor.cli bench decode \\
      --shape llama-3.1-70b --context 131072 --synthetic --ways static,graph
  attnpred bench decode --shape llama-3.1-8b --synthetic \\
      --contexts 1024,8192,32768,131072 --out runs/h200.jsonl \\
      --plot runs/h200.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, check_output, whole_numbers
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.eval.bench.cache_setups import CACHE_SETUPS, names_in
from attention_predictor.eval.display.plots import check_plot
from attention_predictor.kinds import number, whole
from attention_predictor.settings import add_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add = parser.add_argument
    add_option(parser, "--context", whole(), 8192, "tokens of prompt and decoded steps together")
    add("--contexts", metavar="N,N", help="several contexts, instead of --context")
    add("--synthetic", action="store_true", help="fill the caches with made-up keys and values instead of a prefill")
    add_setting(parser, "host_kv")
    add_setting(parser, "late_fetch")
    add("--ways", metavar="W,W", help=f"caches to time: {', '.join(CACHE_SETUPS)}")
    add_option(parser, "--steps", whole(1), 40, "timed steps; 5 steps before and 3 after them are not timed")
    positive = number("more than 0", lambda value: value > 0, "S")
    what = "stop timing a cache after this many seconds, with fewer steps"
    add_option(parser, "--seconds", positive, 60.0, what)
    size = number("more than 0", lambda value: value > 0, "GIB")
    add_option(
        parser,
        "--memory-limit",
        size,
        None,
        "limit torch to this much device memory, in GiB, to simulate a smaller card",
    )
    add(
        "--out",
        type=Path,
        metavar="F",
        help="append each result to this file as a JSON line; a later run measures only missing rows",
    )
    add(
        "--plot",
        type=Path,
        metavar="F",
        help="plot milliseconds per token against context into this .png, .svg or .pdf file",
    )


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    if args.contexts is not None:
        whole_numbers("--contexts", args.contexts)
    if args.ways is not None:
        names_in(args.ways)
    check_output("--out", args.out)
    check_plot(args.plot)
