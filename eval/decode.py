"""Time whole decoding steps of a model behind a long context: with its cache in host memory, and with stock caches.

The tokens decoded are the same for all ways. The context is a prefill of random tokens, or with --synthetic made up:
keys and values that the model's own queries look at as they do at real ones, the same for every way, with no prefill to
wait for. --shape builds a model of a named shape with random weights on the device; --model loads one.

Ways (--ways, default: all that the device has but those in parentheses):
  floor            transformers' StaticCache, torch.compile(mode="reduce-overhead", fullgraph=True), always at a context
                   of 1,024 tokens: what is to be approached
  graph            ours, a whole step as one CUDA graph          graph-compiled   and the model's layers compiled
  thread           ours, with the prefetch thread                (no-kernels)
  device           transformers' DynamicCache on the device      offloaded        the same, offloaded layer by layer

For each: milliseconds a token, median and 95th percentile; the ratio of the median to ours (the first of graph,
graph-compiled, thread that was measured) and to the floor; memory; for ours also hit rate, bytes fetched, exposed wait.
A few further steps are profiled, for milliseconds by stage and the time in which the device stood still.
What does not fit in memory is skipped, and it is said why.

examples:
  attnpred bench decode --context 8192 --budget 512
  attnpred bench decode --shape llama-3.1-8b --context 131072 --budget 1024 --batch 1 --synthetic --json
  attnpred bench decode --shape llama-3.1-8b --synthetic --contexts 1024,8192,32768,131072 --out runs/h200.jsonl \\
      --plot runs/h200.png
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from attention_predictor.arguments import add_model_arguments, whole_numbers
from attention_predictor.eval.bench import machine, report
from attention_predictor.eval.comparison import compare, describe
from attention_predictor.eval.plot import check_plot, plot_timings
from attention_predictor.eval.shapes import SHAPES, check_shape, random_model, shape_config
from attention_predictor.eval.synthetic_cache import PAST, Locality, SyntheticCache
from attention_predictor.eval.timings import TimingsFile
from attention_predictor.eval.trial import Workload, steps_within, try_way
from attention_predictor.eval.ways import FLOOR, FLOOR_CONTEXT, WAYS, choose
from attention_predictor.loading import DTYPES, find_device, load_model
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.forwards import check_positions
from attention_predictor.predictor.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--shape", metavar="S", help=f"a random model in place of --model: one of {', '.join(SHAPES)}")
    add("--context", type=int, default=8192, metavar="N", help="tokens of prompt and steps (%(default)s)")
    add("--contexts", metavar="N,…", help="several of them, in place of --context")
    add("--synthetic", action="store_true", help="make the context up, without a prefill")
    add("--budget", type=int, default=1024, metavar="N", help="tokens a step attends to (%(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="sequences of the same tokens (%(default)s)")
    add("--ways", metavar="W,…", help=f"some of {', '.join(WAYS)}")
    add("--steps", type=int, default=40, metavar="N", help="timed, between 5 and 3 more (%(default)s)")
    what = "for the timed steps of a way: then no more are taken (%(default)s)"
    add("--seconds", type=float, default=60.0, metavar="S", help=what)
    add("--memory-limit", type=float, metavar="GIB", help="device memory torch may use, as if the card had no more")
    add("--json", action="store_true", help="print one JSON object")
    add("--out", type=Path, metavar="F", help="JSON lines, written as rows come; a further run does what is missing")
    add("--plot", type=Path, metavar="F", help="ms a token against context (.png, .svg, .pdf)")


def main(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.batch < 1:
        raise ConfigError("--steps and --batch must be at least 1")
    contexts = [args.context] if args.contexts is None else sorted(set(whole_numbers("--contexts", args.contexts)))
    least = steps_within(args.steps) + (PAST if args.synthetic else 1)
    if min(contexts) < least:
        what = f"the {steps_within(args.steps)} steps within it" + (f" and {PAST} tokens before" * args.synthetic)
        raise ConfigError(f"--context {min(contexts)}: expected at least {least}, for {what}")
    check_plot(args.plot)
    if args.shape is not None:
        check_shape(args.shape)
    if args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype}: expected one of {', '.join(DTYPES)}")
    OffloadConfig(budget=args.budget)
    device = find_device(args.device)
    limit_bytes = _limit(args.memory_limit, device)
    ways = choose(args.ways, device)
    if FLOOR in ways and least > FLOOR_CONTEXT:
        raise ConfigError(f"--steps {args.steps}: too many for the floor's context of {FLOOR_CONTEXT} tokens")
    settings = {name: getattr(args, name) for name in ("budget", "batch", "steps", "synthetic", "seed", "memory_limit")}
    settings |= {"model": args.shape or str(args.model), "dtype": args.dtype}
    if args.synthetic:
        settings["locality"] = asdict(Locality())
    timings = TimingsFile(args.out, settings | {"machine": machine(device)})

    plan = [(FLOOR_CONTEXT, FLOOR)] if FLOOR in ways else []
    plan += [(context, way) for context in contexts for way in ways if way != FLOOR]
    todo = [(context, way) for context, way in plan if timings.find(context=context, way=way) is None]
    if todo:
        _sweep(_model(args, device, max(contexts)), todo, args, limit_bytes, timings)
    rows = compare([row for context, way in plan if (row := timings.find(context=context, way=way)) is not None])
    report("decode", device, settings, rows, line=describe, as_json=args.json)
    if args.plot is not None:
        title = f"Decoding, {settings['model']}, budget {args.budget}, batch {args.batch}\n{machine(device)}"
        plot_timings(rows, args.plot, title, floor=WAYS[FLOOR].name)
    return 0


def _limit(gib: float | None, device: torch.device) -> int | None:
    if gib is None:
        return None
    if device.type != "cuda":
        raise ConfigError(f"--memory-limit {gib}: for CUDA devices, found {device}")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < gib * 2**30 <= total:
        raise ConfigError(f"--memory-limit {gib}: expected more than 0 and at most {total / 2**30:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total, device.index)
    return int(gib * 2**30)


def _model(args: argparse.Namespace, device: torch.device, positions: int) -> PreTrainedModel:
    if args.shape is None:
        model = load_model(args.model, args.device, args.dtype)
        check_positions(model.config.get_text_config(decoder=True), positions)
        return model
    dtype = DTYPES[args.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_model(shape_config(args.shape, positions), device, dtype, args.seed)


def _sweep(
    model: PreTrainedModel,
    todo: list[tuple[int, str]],
    args: argparse.Namespace,
    limit_bytes: int | None,
    timings: TimingsFile,
) -> None:
    """Try ways at contexts; what is made up for a context serves all of its ways."""
    with tqdm(total=len(todo), disable=None, leave=False) as progress:
        for context, group in groupby(todo, key=itemgetter(0)):
            work = _workload(model, context, args, limit_bytes)
            similarity = {} if work.synthetic is None else {"query_similarity": work.synthetic.query_similarity()}
            for _, way in group:
                progress.set_postfix_str(f"{WAYS[way].name}, {context} tokens")
                timings.add({"way": way} | try_way(model, WAYS[way], work) | similarity)
                progress.update()


def _workload(model: PreTrainedModel, context: int, args: argparse.Namespace, limit_bytes: int | None) -> Workload:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if args.shape is None:
        ids_T = torch.randint(vocabulary, (context,), generator=torch.Generator().manual_seed(args.seed))
    else:
        ids_T = torch.arange(context) % vocabulary  # similar, where ids follow each other (``shapes``)
    ids_1T = ids_T[None].to(model.device)
    synthetic, prompt = None, context - steps_within(args.steps)
    if args.synthetic:
        synthetic = SyntheticCache(model, ids_1T[:, prompt - PAST :], prompt, batch=args.batch, seed=args.seed)
    return Workload(
        ids_1T=ids_1T,
        steps=args.steps,
        batch=args.batch,
        budget=args.budget,
        seconds=args.seconds,
        synthetic=synthetic,
        limit_bytes=limit_bytes,
    )
