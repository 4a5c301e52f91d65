"""Where a step's time goes: the profiler's kernels, summed by stage.

On a GPU stages are sums over kernels of all streams, so concurrent kernels count in full. ``idle`` is the time between
the first and the last kernel in which no kernel ran. On a CPU they are sums of the self time of torch's operations;
time in Python, or in code outside torch, is not included.

A kernel of no known stage appears under its own name, like torch's small operations: the name does not tell whether an
addition belongs to the model or to us.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attention_predictor.eval.bench.device import wait

# Stage and what its kernels or operations are called; the first that fits counts. Ours come first, by their own names.
STAGES = (
    ("sketch", r"score_groups|store_groups|sketch"),
    ("history", r"fold_row|observe_row"),
    ("predictor", r"score_tiles|predict_blocks|slide_sums|slide_window|score_columns|(push|predict)_window"),
    ("selection", r"select_blocks|choose_ahead|choose_blocks"),
    ("fused modules", r"rms_norm|gate_up|\brotate_"),
    ("gather", r"gather_blocks|(move|encode)_(coded_)?blocks|append_(coded_)?token|gather_to_host"),
    ("attention", r"attend_slots|sparse_decode|flash|fmha|efficient_attention|scaled_dot_product|sdpa"),
    ("linear layers", r"gemm|gemv|nvjet|cutlass|cublas|splitk|wgmma|linear|matmul|(\b|_)(add|b)?mm(\b|_)"),
    ("copies", r"memcpy|memset|copy_|::to$"),
    ("compiled layers", r"\btriton_"),
    ("norms and activations", r"silu|gelu|rsqrt|rms_?norm|layer_?norm"),
)
# What a step's time is summed up to. Torch's own top-k and sorts are in none: a policy's, or a router's to its experts.
SUMS = {
    "selection, sketch, history, prediction": ("selection", "sketch", "history", "predictor"),
    "gather": ("gather",),
    "copies": ("copies",),
    "attention": ("attention",),
    "the model's own": ("linear layers", "compiled layers", "norms and activations", "fused modules"),
}
UNKNOWN = "of no stage"

_SPACES = re.compile(r"\(anonymous namespace\)::|\bvoid |\b(?:at|native|c10|std|cuda|cub|thrust|detail)::")
_INNER = re.compile(r"\b\w*(?:Functor(?:_\w+)?|Ops?|_kernel(?:_cuda|_impl)?)\b")
_ANY = re.compile(r"(?:Binary|[AB]?Unary|Opaque\w*)Functor|ReduceOp|\w*elementwise_kernel\w*|reduce_kernel")
SHOWN = 60  # characters of a name


@cache
def stage_of(name: str) -> str | None:
    """The stage of a kernel or operation of this name; ``None`` if no stage matches."""
    return next((stage for stage, pattern in STAGES if re.search(pattern, name, re.IGNORECASE)), None)


@cache
def short_name(name: str) -> str:
    """A kernel's name without arguments and namespaces; torch's templates keep their functor's name."""
    plain = _SPACES.sub("", name)
    head = re.split(r"[<(]", plain, maxsplit=1)[0].strip() or plain
    inner = next((one for one in _INNER.findall(plain[len(head) :]) if not _ANY.fullmatch(one)), "")
    return f"{head} {inner}".strip()[:SHOWN]


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
        ``stages_ms``, unknown kernels by name; their ``sums_ms``; on a GPU also ``idle_ms``. ``None`` if
        the profiler saw nothing.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        steps()
        wait(device)
    times: Counter[str] = Counter()
    spans = []
    for event in profiler.events() or ():
        if not gpu:
            times[event.name] += event.self_cpu_time_total / 1000 / count
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            span = event.time_range.start / 1000 / count, event.time_range.end / 1000 / count
            spans.append(span)
            times[event.name] += span[1] - span[0]
    if not times:
        return None
    idle = {"idle_ms": max(end for _, end in spans) - min(spans)[0] - covered(spans)} if gpu else {}
    return summed(times) | idle


def summed(times: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """``stages_ms``, largest first, and ``sums_ms``, which add up to the total, from times by kernel name."""
    stages: defaultdict[str, float] = defaultdict(float)
    sums = dict.fromkeys((*SUMS, UNKNOWN), 0.0)
    for name, ms in times.items():
        stage = stage_of(name)
        stages[short_name(name) if stage is None else stage] += ms
        sums[next((title for title, parts in SUMS.items() if stage in parts), UNKNOWN)] += ms
    return {"sums_ms": sums, "stages_ms": dict(sorted(stages.items(), key=itemgetter(1), reverse=True))}
