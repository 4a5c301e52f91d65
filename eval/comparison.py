"""Ways of decoding side by side: ratios to ours and to the floor, and how a row reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attention_predictor.eval.bench import Row
from attention_predictor.eval.way import FLOOR
from attention_predictor.sizes import size_text

OURS = ("graph", "graph-compiled", "graph-unfused", "thread", "no-kernels")  # the first that was measured is ours


def compare(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with ``to_ours``, at the same context, and ``to_floor``; those without ``median_ms`` stay as they are."""
    floor_ms = next((row["median_ms"] for row in rows if row["way"] == FLOOR and "median_ms" in row), None)
    compared = []
    for row in rows:
        bases: dict[str, float | None] = {}
        if row["way"] != FLOOR and "median_ms" in row:
            bases = {"to_ours": _ours_ms(rows, row["context"]), "to_floor": floor_ms}
        compared.append({**row, **{name: row["median_ms"] / base for name, base in bases.items() if base}})
    return compared


def _ours_ms(rows: Sequence[Row], context: int) -> float | None:
    here = {row["way"]: row["median_ms"] for row in rows if row["context"] == context and "median_ms" in row}
    return next((here[way] for way in OURS if way in here), None)


def describe(row: Row) -> str:
    """A timed row: its times, then memory and traffic, then milliseconds by stage."""
    times = f"{row['median_ms']:9.2f} ms a token, 95%: {row['p95_ms']:9.2f}"
    ratios = [f"{row[key]:7.2f} × {name}" for key, name in (("to_ours", "ours"), ("to_floor", "floor")) if key in row]
    lines = ["  ".join([f"{row['context']:>8} tokens", f"{row['name']:<34}", times, *ratios])]
    facts = []
    if row["peak_device_bytes"] is not None:
        peak, weights = size_text(row["peak_device_bytes"]), size_text(row["weights_bytes"])
        facts.append(f"peak {peak} on the device, {weights} of it weights")
    if "engine" in row:
        facts += _traffic(row)
    if facts:
        lines.append("; ".join(facts))
    if row["breakdown"] is not None:
        stages = [f"{name} {ms:.2f}" for name, ms in row["breakdown"]["stages_ms"].items()]
        if "idle_ms" in row["breakdown"]:
            stages.append(f"nothing {row['breakdown']['idle_ms']:.2f}")
        lines.append("ms in " + ", ".join(stages))
    return "\n              ".join(lines)


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
