"""Schedules: on which thread or CUDA stream each part of a decoding step runs. The order is ``step.py``'s."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.offload.blocks.prefetch import Prefetcher, Ticket

# Layers whose work on the prefetch stream may be unfinished before the next layer waits for the oldest. Each keeps its
# step's tensors alive; four are enough to hide the fetches.
MAX_LAYERS_AHEAD = 4


class Schedule(Protocol):
    """Where the parts of a step run."""

    def begin(self) -> None:
        """Start a step: its query, key and value have been queued on the model's stream."""
        ...

    def on_sketch_stream(self) -> AbstractContextManager[None]:
        """Run the body on the sketch stream. It may read what was queued before ``begin``; its results may be used
        after ``join_sketch``."""
        ...

    def join_sketch(self) -> None:
        """Make the model's stream wait for the sketch stream."""
        ...

    def on_prefetch_stream(self, held: object) -> AbstractContextManager[None]:
        """Run the body on the prefetch stream, after work already queued. ``held``: the tensors that the body reads."""
        ...

    def fetch(self, job: Callable[[], None]) -> Ticket | None:
        """Run the fetch for the next token. Returns a ticket to wait for, or ``None`` if streams order it."""
        ...


class EagerSchedule:
    """Runs everything on the caller's stream, in order; the prefetcher runs the fetches for the next token."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self.prefetcher = prefetcher

    def begin(self) -> None:
        """Nothing to do."""

    def on_sketch_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join_sketch(self) -> None:
        """Nothing to wait for."""

    def on_prefetch_stream(self, held: object) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, job: Callable[[], None]) -> Ticket:
        return self.prefetcher.submit(job)

    def __deepcopy__(self, memo: dict) -> EagerSchedule:
        return self  # a copied cache has the same prefetcher


class StreamSchedule:
    """Uses two CUDA streams beside the model's: one for the sketch's scores, one to prepare the next token.

    It needs no CPU work, so the steps of all layers can be one CUDA graph. On a CPU everything runs in order.

    Attributes:
        stall_ns_1: int64, nanoseconds for which the model's stream waited for late fetches, and for the last fetches
            ahead.
    """

    def __init__(self, device: torch.device, stall_ns_1: Tensor) -> None:
        self.stall_ns_1 = stall_ns_1
        self._sketch_stream, self._prefetch_stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)
        )
        self._unfinished: deque[tuple[Any, Any]] = deque()  # of each layer: event at its end, tensors that it reads

    def begin(self) -> None:
        if self._sketch_stream is not None:
            self._sketch_stream.wait_stream(torch.cuda.current_stream(self._sketch_stream.device))

    @contextmanager
    def on_sketch_stream(self) -> Iterator[None]:
        """As in ``Schedule``. Memory allocated within belongs to the sketch stream: it is reused only by the next
        layer's body, which waits for the model's stream."""
        if self._sketch_stream is None:
            yield
            return
        with torch.cuda.stream(self._sketch_stream):
            yield

    def join_sketch(self) -> None:
        if self._sketch_stream is not None:
            torch.cuda.current_stream(self._sketch_stream.device).wait_stream(self._sketch_stream)

    @contextmanager
    def on_prefetch_stream(self, held: object) -> Iterator[None]:
        """As in ``Schedule``. ``held`` stays alive until the body has run: its memory must not be reused before."""
        if self._prefetch_stream is None:
            yield
            return
        model_stream = torch.cuda.current_stream(self._prefetch_stream.device)
        while len(self._unfinished) >= MAX_LAYERS_AHEAD:
            self._wait_for_oldest(model_stream)
        self._prefetch_stream.wait_stream(model_stream)
        with torch.cuda.stream(self._prefetch_stream):
            yield
            done = torch.cuda.Event()
            done.record(self._prefetch_stream)
        self._unfinished.append((done, held))

    def fetch(self, job: Callable[[], None]) -> None:
        job()

    def join_prefetch(self) -> None:
        """Make the model's stream wait for the prefetch stream; that time counts as exposed wait."""
        ops.note_time(self.stall_ns_1, -1)
        while self._prefetch_stream is not None and self._unfinished:
            self._wait_for_oldest(torch.cuda.current_stream(self._prefetch_stream.device))
        ops.note_time(self.stall_ns_1, 1)

    def _wait_for_oldest(self, model_stream: torch.cuda.Stream) -> None:
        done, _ = self._unfinished.popleft()
        model_stream.wait_event(done)
