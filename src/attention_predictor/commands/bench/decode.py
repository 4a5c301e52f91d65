"""Time whole decoding steps of a model behind a long context: with its cache in host memory, and with stock caches.

The tokens decoded are the same for all ways. The context is a prefill of random tokens, or with --synthetic made up:
keys and values that the model's own queries look at as they do at real ones, the same for every way, with no prefill to
wait for. --shape builds a model of a named shape with random weights on the device; --model loads one.

Ways (--ways; those in parentheses, and on a CPU those that need a GPU, are
not measured unless asked for):
  floor           transformers' StaticCache, compiled, always at a context of
                  1,024 tokens: what is to be approached
  static          transformers' StaticCache, a whole step as one CUDA graph,
                  always at 1,024 tokens: what is to be approached uncompiled
  (ours)          ours, default settings
  graph           ours, a whole step as one CUDA graph, in which norms,
                  gated MLPs and rotary embeddings are a kernel each
  (graph-unfused) the same without these kernels, the model's operations one
                  by one
  graph-compiled  the same, and the model's layers compiled
  thread          ours, with the prefetch thread
  (no-kernels)    the same, with torch operations alone
  (resident)      the whole cache on the device, attended to by the fastest of
                  torch's kernels (cuDNN, flash) without copies for grouped
                  heads, a whole step as one CUDA graph: the strongest thing
                  to compare with while it fits. Lengths in a graph are fixed,
                  so each step decodes another token behind the same prompt.
                  On a CPU it is not captured
  (resident-compiled)  the same, and the model's layers compiled
  device          transformers' DynamicCache on the device
  offloaded       the same, offloaded layer by layer

For each: milliseconds a token, median and 95th percentile; the ratio of the median to ours (the first of graph, ours,
graph-compiled, graph-unfused, thread that was measured), to the floor and to static; memory; for ours also hit rate,
bytes fetched, exposed wait. A few further steps are profiled, for milliseconds by stage, sums of these, and the time in
which the device stood still; a kernel that belongs to no stage stands under its own name.
What does not fit in memory is skipped, and it is said why; so is the stock model where it can't be compiled or
captured.

examples:
  attnpred bench decode --context 8192 --budget 512
  attnpred bench decode --shape llama-3.1-8b --context 131072 --budget 1024 \\
      --batch 1 --synthetic --json
  attnpred bench decode --shape llama-3.1-8b --context 131072 --synthetic \\
      --ways graph,graph-unfused,graph-compiled    # what fusing gains
  attnpred bench decode --shape gpt-oss-20b --context 131072 --synthetic \\
      --ways floor,static,graph,graph-compiled
  attnpred bench decode --shape llama-3.1-8b --synthetic \\
      --contexts 1024,8192,32768,131072 --out runs/h200.jsonl \\
      --plot runs/h200.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_option, whole_numbers
from attention_predictor.commands.bench.model_options import add_shape_arguments, check_shape_arguments
from attention_predictor.eval.bench.cache_setups import CACHE_SETUPS, check_setups
from attention_predictor.eval.display.plots import check_plot
from attention_predictor.kinds import number, whole
from attention_predictor.settings import add_setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_arguments(parser)
    add = parser.add_argument
    add_option(parser, "--context", whole(), 8192, "tokens of prompt and steps")
    add("--contexts", metavar="N,N", help="several of them, in place of --context")
    add("--synthetic", action="store_true", help="make the context up, without a prefill")
    add_setting(parser, "host_kv")
    add("--ways", metavar="W,W", help=f"some of {', '.join(CACHE_SETUPS)}")
    add_option(parser, "--steps", whole(1), 40, "timed, between 5 and 3 more")
    positive = number("more than 0", lambda value: value > 0, "S")
    what = "for the timed steps of a way: then no more are taken"
    add_option(parser, "--seconds", positive, 60.0, what)
    size = number("more than 0", lambda value: value > 0, "GIB")
    add_option(parser, "--memory-limit", size, None, "device memory torch may use, as if the card had no more")
    add("--out", type=Path, metavar="F", help="JSON lines, written as rows come; a further run does what is missing")
    add("--plot", type=Path, metavar="F", help="ms a token against context (.png, .svg, .pdf)")


def check(args: argparse.Namespace) -> None:
    check_shape_arguments(args)
    if args.contexts is not None:
        whole_numbers("--contexts", args.contexts)
    if args.ways is not None:
        check_setups(args.ways.split(","))
    check_plot(args.plot)
