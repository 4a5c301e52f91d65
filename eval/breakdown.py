"""Where a step's time goes: the profiler's kernels, summed by stage.

On a GPU stages are sums over its kernels, on whatever stream: what runs beside something else counts in full. ``idle``
is the time between the first kernel and the last in which none ran at all. On a CPU they are sums over torch's
operations, without what they call; what Python takes, or calls past torch, shows nowhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attention_predictor.eval.device import wait

# Stage and what its kernels or operations are called; the first that fits counts. Ours come first, by their own names.
STAGES = (
    ("sketch", r"score_groups|store_groups|sketch"),
    ("history", r"fold_row|observe_row"),
    ("predictor", r"score_tiles|predict_blocks|slide_sums|slide_window|score_columns|(push|predict)_window"),
    ("selection", r"select_blocks|choose_ahead|choose_blocks|topk|radix|bitonic|\bsort"),
    ("gather", r"gather_blocks|move_blocks|append_token|gather_to_pool|gather_to_host"),
    ("attention", r"attend_slots|sparse_decode|flash|fmha|efficient_attention|scaled_dot_product|sdpa"),
    ("linear layers", r"gemm|gemv|nvjet|cutlass|cublas|splitk|wgmma|linear|matmul|(\b|_)(add|b)?mm(\b|_)"),
    ("copies", r"memcpy|memset|copy_|::to$"),
)
OTHER = "other"


@cache
def stage_of(name: str) -> str:
    """The stage that a kernel or an operation of this name belongs to."""
    return next((stage for stage, pattern in STAGES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def breakdown(steps: Callable[[], None], count: int, device: torch.device) -> dict[str, Any] | None:
    """Milliseconds a step by stage, largest first, of ``count`` steps that ``steps`` takes.

    Returns:
        ``stages_ms``; on a GPU ``idle_ms`` too. ``None`` where the profiler saw nothing.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        steps()
        wait(device)
    stages: Counter[str] = Counter()
    spans = []
    for event in profiler.events() or ():
        if not gpu:
            stages[stage_of(event.name)] += event.self_cpu_time_total / 1000 / count
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            span = event.time_range.start / 1000 / count, event.time_range.end / 1000 / count
            spans.append(span)
            stages[stage_of(event.name)] += span[1] - span[0]
    if not stages:
        return None
    idle = {"idle_ms": max(end for _, end in spans) - min(spans)[0] - covered(spans)} if gpu else {}
    return {"stages_ms": dict(stages.most_common()), **idle}
