"""Schedules: what of a decoding step runs beside what. Eagerly with the prefetcher, or on CUDA streams in a graph.

The order of a step stands in ``step.py``; a schedule decides on which thread or stream each part of it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.offload.blocks.prefetch import Prefetcher, Ticket

# Layers whose fetches for the next token may be under way before the next layer's step waits for the first of them:
# what a step holds in the meantime takes memory, and four layers are enough to hide behind.
DEPTH = 4


class Schedule(Protocol):
    """Where the parts of a step run."""

    def begin(self) -> None:
        """A step begins: its query, key and value are there."""
        ...

    def estimate(self) -> AbstractContextManager[None]:
        """Around what needs these alone; its results may be used after ``join_estimate``."""
        ...

    def join_estimate(self) -> None:
        """What follows comes after the estimate."""
        ...

    def ahead(self, held: object) -> AbstractContextManager[None]:
        """Around what the next token is prepared by; ``held`` are the tensors that it reads."""
        ...

    def fetch(self, job: Callable[[], None]) -> Ticket | None:
        """Run the fetch for the next token; what waits for it, if anything has to."""
        ...


class EagerSchedule:
    """One operation after another, as they come; fetches for the next token are the prefetcher's."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self.prefetcher = prefetcher

    def begin(self) -> None:
        """Nothing runs beside a step."""

    def estimate(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join_estimate(self) -> None:
        """Nothing to wait for."""

    def ahead(self, held: object) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, job: Callable[[], None]) -> Ticket:
        return self.prefetcher.submit(job)

    def __deepcopy__(self, memo: dict) -> EagerSchedule:
        return self  # a copied cache has the same prefetcher


class StreamSchedule:
    """Two CUDA streams beside the model's: for the estimate, and for what prepares the next token.

    No host takes part, so that all layers' steps can be one CUDA graph. On a CPU everything runs in order.

    Attributes:
        spent_1: int64 nanoseconds for which the model's stream stood still: late fetches, and waiting for the last
            fetches ahead.
    """

    def __init__(self, device: torch.device, spent_1: Tensor) -> None:
        self.spent_1 = spent_1
        self._estimating, self._preparing = (
            torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)
        )
        self._under_way: deque[tuple[Any, Any]] = deque()

    def begin(self) -> None:
        if self._estimating is not None:
            self._estimating.wait_stream(torch.cuda.current_stream(self._estimating.device))

    @contextmanager
    def estimate(self) -> Iterator[None]:
        """What is made within is the stream's own memory: used again when that stream comes to the next layer, behind
        whatever the model's stream does now."""
        if self._estimating is None:
            yield
            return
        with torch.cuda.stream(self._estimating):
            yield

    def join_estimate(self) -> None:
        if self._estimating is not None:
            torch.cuda.current_stream(self._estimating.device).wait_stream(self._estimating)

    @contextmanager
    def ahead(self, held: object) -> Iterator[None]:
        """``held`` stays alive until this is done: its memory must not be used again before."""
        if self._preparing is None:
            yield
            return
        model = torch.cuda.current_stream(self._preparing.device)
        while len(self._under_way) >= DEPTH:
            self._wait(model)
        self._preparing.wait_stream(model)
        with torch.cuda.stream(self._preparing):
            yield
            done = torch.cuda.Event()
            done.record(self._preparing)
        self._under_way.append((done, held))

    def fetch(self, job: Callable[[], None]) -> None:
        job()

    def join(self) -> None:
        """The model's stream waits for all that prepares the next token; that time counts as exposed."""
        ops.note_time(self.spent_1, -1)
        while self._preparing is not None and self._under_way:
            self._wait(torch.cuda.current_stream(self._preparing.device))
        ops.note_time(self.spent_1, 1)

    def _wait(self, model: torch.cuda.Stream) -> None:
        done, _ = self._under_way.popleft()
        model.wait_event(done)
