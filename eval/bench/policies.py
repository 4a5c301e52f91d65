"""``attnpred bench policies``: times a decoding step under every policy, with ratios to the first."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from attention_predictor.commands.bench.policy_options import policies_of
from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.cache_setups import CacheSetup
from attention_predictor.eval.bench.capture_status import how_taken, why_not_captured
from attention_predictor.eval.bench.comparison import breakdown_lines
from attention_predictor.eval.bench.decode_timing import Workload, steps_within, time_setup
from attention_predictor.eval.bench.random_models import random_or_loaded
from attention_predictor.eval.bench.synthetic_cache import PAST, Locality
from attention_predictor.eval.bench.timing_report import Row, machine, report, with_ratios
from attention_predictor.eval.bench.timings_file import TimingsFile
from attention_predictor.loading import find_device
from attention_predictor.progress import Progress


def main(args: argparse.Namespace) -> int:
    if args.context < (least := steps_within(args.steps) + PAST):
        raise ConfigError(f"--context {args.context}: expected at least {least}, for steps and {PAST} tokens before")
    device, policies = find_device(args.device), policies_of(args.policies)
    settings = {
        name: getattr(args, name) for name in ("context", "budget", "batch", "steps", "seed", "dtype", "host_kv")
    }
    settings["model"] = args.shape or str(args.model)
    kept = settings | {"locality": asdict(Locality()), "machine": machine(device)}
    timings = TimingsFile(args.out, kept)
    if left := [name for name in policies if timings.find(policy=name) is None]:
        model = random_or_loaded(args, device, args.context)
        work = Workload.of(model, args.context, args)
        with Progress("policies", len(left), "policies") as progress:
            for name in left:
                progress.describe(name)
                row = {"policy": name} | time_setup(model, CacheSetup(name, "ours", {"policy": name}), work)
                if "engine" in row:
                    row["not_captured"] = why_not_captured(name, row["engine"])
                timings.add(row)
                progress.update()
    found = [timings.find(policy=name) for name in policies]
    rows = with_ratios([one for one in found if one is not None], "median_ms")
    report("policies", device, settings, rows, line=_describe, as_json=args.json)
    return 0


def _describe(row: Row) -> str:
    times = f"{row['median_ms']:9.2f} ms a token, 95%: {row['p95_ms']:9.2f}, {row['ratio']:7.2f} × the first"
    lines = [f"{row['name']:<16}{times}, {how_taken(row['policy'], row['engine'])}"]
    if row["breakdown"] is not None:
        lines += breakdown_lines(row["breakdown"])
    return "\n              ".join(lines)
