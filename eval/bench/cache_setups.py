"""The caches that timings compare, by name: ours and those of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attention_predictor.errors import ConfigError

FLOOR_CONTEXT = 1024  # context at which the floor is measured


@dataclass(frozen=True, slots=True)
class CacheSetup:
    """A cache to time.

    Attributes:
        name: The name in tables and plots.
        kind: Ours, transformers' ``DynamicCache``, its ``StaticCache`` with the whole step captured, or the whole cache
            on the device under torch's fastest attention, captured (``resident_step.py``).
        options: Fields of ``OffloadConfig`` or of the stock cache; ``compile`` compiles the whole stock model.
        needs_gpu: Whether it needs a CUDA device.
        by_default: Whether it is timed without ``--ways``. (On a CPU, compiled setups are not.)
    """

    name: str
    kind: Literal["ours", "dynamic", "static", "resident"]
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_gpu: bool = False
    by_default: bool = True


FLOOR, STATIC = "floor", "static"
AT_FLOOR_CONTEXT = (FLOOR, STATIC)
CACHE_SETUPS = {
    FLOOR: CacheSetup("static cache, compiled, 1K context", "static", {"compile": True}),
    STATIC: CacheSetup("static cache, captured, 1K context", "static"),
    "ours": CacheSetup("ours, default settings", "ours", by_default=False),
    "graph": CacheSetup("ours, graph", "ours", {"prefetch": "graph"}, needs_gpu=True),
    "graph-unfused": CacheSetup(
        "ours, graph, nothing fused", "ours", {"prefetch": "graph", "unfused": True}, needs_gpu=True, by_default=False
    ),
    "graph-compiled": CacheSetup(
        "ours, graph, compiled layers", "ours", {"prefetch": "graph", "compile": True}, needs_gpu=True
    ),
    "thread": CacheSetup("ours, thread", "ours", {"prefetch": "thread"}),
    "no-kernels": CacheSetup(
        "ours, thread, no kernels", "ours", {"prefetch": "thread", "kernels": "none"}, by_default=False
    ),
    "resident": CacheSetup("all on the device, captured", "resident", by_default=False),
    "resident-compiled": CacheSetup(
        "all on the device, compiled", "resident", {"compile": True}, needs_gpu=True, by_default=False
    ),
    "device": CacheSetup("stock cache on the device", "dynamic"),
    "offloaded": CacheSetup("stock cache, offloaded", "dynamic", {"offloading": True}, needs_gpu=True),
}

# Setups of ``attnpred bench prefill``.
STOCK = "device"
PREFILL_SETUPS = {
    "ours": CacheSetup("ours", "ours"),
    "bare": CacheSetup("ours, without sketch and history", "ours", {"policy": "streaming"}),
    STOCK: CACHE_SETUPS[STOCK],
    "offloaded": CACHE_SETUPS["offloaded"],
}


def names_in(ways: str, known: Iterable[str] = CACHE_SETUPS) -> list[str]:
    """The names in ``--ways``, such as ``"graph,device"``; ``ConfigError`` for one that is not known."""
    names = [name.strip() for name in ways.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--ways {unknown[0]!r} is not known: expected some of {', '.join(known)}")
    return names


def named_setup(name: str, setups: Mapping[str, CacheSetup], device: str) -> CacheSetup:
    """A setup named in ``--ways``; ``ConfigError`` if it can't be measured on a device of this type."""
    if setups[name].needs_gpu and device != "cuda":
        raise ConfigError(f"--ways {name}: it needs a CUDA device, found {device}")
    return setups[name]
