"""Compares timed setups: ratios to ours and to the floor, and the printed lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_predictor.eval.bench.cache_setups import AT_FLOOR_CONTEXT, FLOOR, STATIC
from attention_predictor.eval.bench.timing_report import Row
from attention_predictor.sizes import size_text

WORTH_SHOWING = 0.01  # share of a step's time; smaller stages and kernels are summed up
# In order of preference: the first one measured is "ours".
OURS = ("graph", "ours", "graph-compiled", "graph-unfused", "thread", "no-kernels")


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Add ``to_ours`` (at the same context), ``to_floor`` and ``to_static`` to rows; skipped rows stay unchanged."""
    floors_ms = {row["way"]: row["median_ms"] for row in rows if row["way"] in AT_FLOOR_CONTEXT and "median_ms" in row}
    compared = []
    for row in rows:
        bases: dict[str, float | None] = {}
        if row["way"] not in AT_FLOOR_CONTEXT and "median_ms" in row:
            bases = {"to_ours": _ours_ms(rows, row["context"])}
            bases |= {"to_floor": floors_ms.get(FLOOR), "to_static": floors_ms.get(STATIC)}
        compared.append({**row, **{name: row["median_ms"] / base for name, base in bases.items() if base}})
    return compared


def _ours_ms(rows: Sequence[Row], context: int) -> float | None:
    here = {row["way"]: row["median_ms"] for row in rows if row["context"] == context and "median_ms" in row}
    return next((here[setup] for setup in OURS if setup in here), None)


def describe(row: Row) -> str:
    """The printed lines of a timed row: times, memory and traffic, milliseconds by stage."""
    times = f"{row['median_ms']:9.2f} ms a token, 95%: {row['p95_ms']:9.2f}"
    bases = (("to_ours", "ours"), ("to_floor", "floor"), ("to_static", "static"))
    ratios = [f"{row[key]:7.2f} × {name}" for key, name in bases if key in row]
    lines = ["  ".join([f"{row['context']:>8} tokens", f"{row['name']:<34}", times, *ratios])]
    facts = []
    if row["peak_device_bytes"] is not None:
        peak, weights = size_text(row["peak_device_bytes"]), size_text(row["weights_bytes"])
        facts.append(f"peak {peak} on the device, {weights} of it weights")
    if "attention" in row:
        facts.append(f"attention by {row['attention']}" + ("" if row["captured"] else ", not captured: on a CPU"))
    if "engine" in row:
        facts += _traffic(row)
    if facts:
        lines.append("; ".join(facts))
    if row["breakdown"] is not None:
        lines += breakdown_lines(row["breakdown"])
    return "\n              ".join(lines)


def breakdown_lines(found: Row) -> list[str]:
    """One line of sums, one of stages and kernels; those below ``WORTH_SHOWING`` are summed up."""
    nothing = {"nothing": found["idle_ms"]} if "idle_ms" in found else {}
    least_ms = WORTH_SHOWING * sum(found["stages_ms"].values())
    shown = {name: ms for name, ms in found["stages_ms"].items() if ms >= least_ms}
    small = [ms for ms in found["stages_ms"].values() if ms < least_ms]
    rest = {f"{len(small)} more": sum(small)} if small else {}
    return [
        f"ms in {title}: " + "; ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
        for title, parts in (("sum", found["sums_ms"] | nothing), ("detail", shown | rest))
    ]


def _traffic(row: Row) -> list[str]:
    stats, waited_ms = row["engine"], row["exposed_wait_ms_per_token"]
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in stats["device_kv_parts"].items())
    shares = [(stats["hit_rate"], "hit"), (stats["reuse_rate"], "kept")]
    return [
        f"KV {size_text(stats['device_kv_bytes'])} of {size_text(stats['full_kv_bytes'])} ({parts})",
        *(f"{share:.1%} {name}" for share, name in shares if share is not None),
        *([f"fused: {stats['fused']}"] if stats.get("fused") else []),
        f"{size_text(row['fetched_bytes_per_token'])} fetched",
        f"{waited_ms:.2f} ms waited ({waited_ms / row['median_ms']:.1%})",
        *(f"fallback ×{count}: {message}" for message, count in stats["fallbacks"].items()),
    ]
