"""``attnpred bench decode``: times whole decoding steps of a model, by context and cache setup."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter

from transformers import PreTrainedModel

from attention_predictor.arguments import whole_numbers
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.cache_sessions import choose_setups
from attention_predictor.eval.bench.cache_setups import AT_FLOOR_CONTEXT, CACHE_SETUPS, FLOOR, FLOOR_CONTEXT, STATIC
from attention_predictor.eval.bench.comparison import compare, describe
from attention_predictor.eval.bench.decode_timing import Workload, steps_within, time_setup
from attention_predictor.eval.bench.device import limit_memory
from attention_predictor.eval.bench.random_models import random_or_loaded
from attention_predictor.eval.bench.synthetic_cache import PAST, Locality
from attention_predictor.eval.bench.timing_report import machine, report
from attention_predictor.eval.bench.timings_file import TimingsFile
from attention_predictor.eval.display.plots import plot_timings
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.loading import device_name, find_device
from attention_predictor.progress import Progress


def main(args: argparse.Namespace) -> int:
    """Processes of a launcher divide the model; the first one prints."""
    with (processes := Processes(divide_model=True)).as_one():
        return _run(args, processes)


def _run(args: argparse.Namespace, processes: Processes) -> int:
    contexts = [args.context] if args.contexts is None else sorted(set(whole_numbers("--contexts", args.contexts)))
    least = steps_within(args.steps) + (PAST if args.synthetic else 1)
    if min(contexts) < least:
        what = f"the {steps_within(args.steps)} steps within it" + (f" and {PAST} tokens before" * args.synthetic)
        raise ConfigError(f"--context {min(contexts)}: expected at least {least}, for {what}")
    device = find_device(processes.device(device_name(args.device)))
    limit_bytes = limit_memory(args.memory_limit, device)
    setups = choose_setups(args.ways, device)
    floors = [setup for setup in setups if setup in AT_FLOOR_CONTEXT]
    if floors and least > FLOOR_CONTEXT:
        raise ConfigError(f"--steps {args.steps}: too many for the floor's context of {FLOOR_CONTEXT} tokens")
    names = ("budget", "batch", "steps", "synthetic", "seed", "memory_limit", "dtype", "host_kv", "late_fetch")
    settings = {name: getattr(args, name) for name in names} | {"model": args.shape or str(args.model)}
    if args.synthetic:
        settings["locality"] = asdict(Locality())
    where = machine(device) + (f", {processes.count} of them" if processes.count > 1 else "")
    timings = TimingsFile(args.out, settings | {"machine": where}, writes=processes.is_main)

    plan = [(FLOOR_CONTEXT, setup) for setup in floors]
    plan += [(context, setup) for context in contexts for setup in setups if setup not in floors]
    todo = [(context, setup) for context, setup in plan if timings.find(context=context, way=setup) is None]
    if todo:
        with processes:
            model = random_or_loaded(args, device, max(contexts), processes.count)
            _sweep(model, todo, args, limit_bytes, timings, quiet=not processes.is_main)
    rows = compare([row for context, setup in plan if (row := timings.find(context=context, way=setup)) is not None])
    report("decode", device, settings, rows, line=describe, as_json=args.json)
    if args.plot is not None and processes.is_main:
        title = f"Decoding, {settings['model']}, budget {args.budget}, batch {args.batch}, host KV {args.host_kv}"
        title += f"\n{where}"
        drawn = [row for row in rows if row["way"] != STATIC or FLOOR not in floors]  # one level
        plot_timings(drawn, args.plot, title, floor=CACHE_SETUPS[FLOOR if FLOOR in floors else STATIC].name)
    return 0


def _sweep(
    model: PreTrainedModel,
    todo: list[tuple[int, str]],
    args: argparse.Namespace,
    limit_bytes: int | None,
    timings: TimingsFile,
    *,
    quiet: bool,
) -> None:
    """Time setups at contexts; all setups of a context share its synthetic cache."""
    with Progress("decoding", len(todo), "measurements", quiet=quiet) as progress:
        for context, group in groupby(todo, key=itemgetter(0)):
            work = Workload.of(model, context, args, limit_bytes)
            similarity = {} if work.synthetic is None else {"query_similarity": work.synthetic.query_similarity()}
            for _, setup in group:
                progress.describe(f"{CACHE_SETUPS[setup].name}, {context} tokens")
                timings.add({"way": setup} | time_setup(model, CACHE_SETUPS[setup], work) | similarity)
                progress.update()
