"""Times one call: kernels alone, with inputs that are not in the GPU's cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from attention_predictor.arithmetic import ceil_div

WARM_UP = 3  # calls
LEAST_LAUNCHES = 20  # in one captured graph; their mean hides the cost of launching it
LEAST_REPLAYS = 5
MOST_SETS = 64  # most inputs to cycle through
OTHER_CACHE_BYTES = 64 << 20  # where torch does not report the size of the GPU's cache

Call = Callable[[], object]


def input_sets(nbytes: int, device: torch.device) -> int:
    """Number of inputs of ``nbytes`` to cycle through so that none is in the GPU's cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or OTHER_CACHE_BYTES
    return min(2 * cache // max(nbytes, 1) + 2, MOST_SETS)


def timed(
    name: str,
    calls: Sequence[Call],
    device: torch.device,
    *,
    repeats: int,
    seconds: float = 20.0,
    moved: int | None = None,
    capturable: bool = True,
) -> dict[str, Any]:
    """Milliseconds of one call, medians.

    Args:
        calls: The call for different inputs, used in a cycle.
        repeats: Timed calls; fewer if they take more than ``seconds``.
        moved: Bytes that a call must move.
        capturable: Whether a CUDA graph can hold it: no work for the host in it, no waiting.

    Returns:
        ``ms``: by replaying a graph of many calls, where it can be captured: what the device takes. ``eager_ms``:
        called from Python one by one, launches included. On a CPU, and where it can't be captured, they are the
        same. ``gb_per_s``, of the first, if ``moved`` is given.
    """
    gpu = device.type == "cuda"
    with torch.cuda.device(device) if gpu else nullcontext():
        for i in range(max(WARM_UP, len(calls)) if gpu else 1):
            calls[i % len(calls)]()
        eager_ms = ms = median(_one_by_one(calls, gpu, repeats, seconds))
        if gpu and capturable:
            ms = _by_graph(calls, repeats, seconds)
    rate = {} if moved is None else {"gb_per_s": moved / ms / 1e6}
    return {"name": name, "ms": ms, "eager_ms": eager_ms, **rate}


def _one_by_one(calls: Sequence[Call], gpu: bool, repeats: int, seconds: float) -> list[float]:
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1000 * seconds:
        call = calls[len(times) % len(calls)]
        if gpu:
            times.append(_event_ms(call))
        else:
            begun = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begun))
    return times


def _by_graph(calls: Sequence[Call], repeats: int, seconds: float) -> float:
    launches = ceil_div(LEAST_LAUNCHES, len(calls)) * len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    graph.replay()
    times: list[float] = []
    while len(times) < max(LEAST_REPLAYS, repeats // launches) and sum(times) < 1000 * seconds:
        times.append(_event_ms(graph.replay))
    return median(times) / launches


def _event_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
