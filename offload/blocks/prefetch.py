"""Prefetchers: run fetches in a worker thread with its own CUDA stream, or synchronously.

A job is any callable that fetches. Jobs run one at a time, in the order of `submit`, without gradients and in the
caller's inference mode.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from attention_predictor.errors import ConfigError, FetchError, IntegrityError

SETTLE_S = 1e-4  # interval at which drain() looks whether a finished job is let go of
POLL_S = 0.05  # interval at which a blocked caller checks that the worker is alive
CLOSED = "the prefetcher is closed: its engine was detached"
CLOSE_S = 5.0  # time that close() gives submitted jobs to finish


class Ticket:
    """One submitted job. `done`: the job has returned; its result may be read after `wait`."""

    def __init__(self, job: Callable[[], None]) -> None:
        self.done = False
        self._job: Callable[[], None] | None = job
        self._inference = torch.is_inference_mode_enabled()
        self._wait_ms = 0.0  # time of a job that ran in submit
        self._submitted: torch.cuda.Event | None = None
        self._finished: torch.cuda.Event | None = None
        # Held until the job is done. A plain lock, because a thread killed inside a threading.Condition can leave it
        # locked for ever.
        self._undone = threading.Lock()
        self._undone.acquire()

    def _run(self) -> None:
        assert self._job is not None
        with torch.inference_mode(self._inference), torch.no_grad():
            self._job()

    def _finish(self) -> None:
        self.done = True
        self._undone.release()

    def _wait_briefly(self) -> None:
        if self._undone.acquire(timeout=POLL_S):
            self._undone.release()  # for others that wait


class Prefetcher(ABC):
    """Runs jobs, and raises their errors in the thread that waits.

    After a failure no job runs, and every later `submit` and `wait` raises FetchError.
    """

    @abstractmethod
    def submit(self, job: Callable[[], None]) -> Ticket:
        """Queues `job`. Raises FetchError after a failure or after `close`."""

    @abstractmethod
    def wait(self, ticket: Ticket) -> float:
        """Returns when the caller's current stream may use the job's result.

        Returns the exposed wait in ms: host time that this call took, without waits on the device. Raises FetchError,
        from the job's own error, if this or another job failed.
        """

    @abstractmethod
    def drain(self) -> None:
        """Waits until all jobs are finished, and hold nothing any more, or the worker is gone. Never raises."""

    @abstractmethod
    def close(self) -> None:
        """Finishes submitted jobs and ends the worker. Never raises; may be called after a failure, or twice."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, if the outstanding jobs are inconsistent."""

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefetcher:
        """The same object: copied caches share the prefetcher."""
        return self


class SyncPrefetcher(Prefetcher):
    """Runs every job in `submit`, on the caller's stream; its time is the exposed wait."""

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._closed = False

    def submit(self, job: Callable[[], None]) -> Ticket:
        self._check()
        if self._closed:
            raise FetchError(CLOSED)
        ticket = Ticket(job)
        start = time.perf_counter()
        try:
            ticket._run()
        except Exception as error:
            self._error = error  # raised by wait, as everywhere
        ticket._wait_ms = (time.perf_counter() - start) * 1e3
        ticket._job = None
        ticket._finish()
        return ticket

    def wait(self, ticket: Ticket) -> float:
        self._check()
        waited_ms, ticket._wait_ms = ticket._wait_ms, 0.0
        return waited_ms

    def drain(self) -> None:
        """Nothing is ever outstanding."""

    def close(self) -> None:
        self._closed = True

    def check_integrity(self) -> None:
        """Nothing to check: no job is ever outstanding."""

    def _check(self) -> None:
        if self._error is not None:
            raise FetchError(f"a fetch failed: {self._error!r}") from self._error


class _Mailbox:
    """State shared with the worker. Not the prefetcher itself: the worker's reference would keep it alive."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Ticket | None] = SimpleQueue()  # None: no more jobs
        self.error: BaseException | None = None
        self.cancelled = False


class ThreadPrefetcher(Prefetcher):
    """Runs jobs in one daemon thread, started by the first `submit`; on CUDA in a stream of its own.

    On CUDA, a job's work starts after the work already queued on the stream current at `submit`, and `wait` makes the
    current stream wait for it. The next job runs when that work is done, so jobs may share a staging buffer. `submit`
    blocks while `depth` jobs are unfinished.
    """

    def __init__(self, device: torch.device | str, *, depth: int = 64) -> None:
        if depth < 1:
            raise ConfigError(f"depth must be at least 1, got {depth}")
        self.device = torch.device(device)
        self.depth = depth
        self._mailbox = _Mailbox()
        self._unfinished: deque[Ticket] = deque()
        self._submitting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        # Ends the worker even if nobody calls close().
        self._end = weakref.finalize(self, self._mailbox.jobs.put, None)

    def submit(self, job: Callable[[], None]) -> Ticket:
        ticket = Ticket(job)
        with self._submitting:
            self._check()
            if self._thread is None:
                self._start()
            while self._unfinished and (len(self._unfinished) >= self.depth or self._unfinished[0].done):
                if self._unfinished[0].done:
                    self._unfinished.popleft()
                else:
                    self._unfinished[0]._wait_briefly()
                    self._check()
            if self.device.type == "cuda":
                ticket._submitted = torch.cuda.current_stream(self.device).record_event()
            # In this order: after an interrupt in between, no ticket is waited for that the worker never got.
            self._mailbox.jobs.put(ticket)
            self._unfinished.append(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> float:
        start = time.perf_counter()
        while not ticket.done:
            self._check(ticket)
            ticket._wait_briefly()
        self._check(ticket)
        if ticket._finished is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket._finished)
        return (time.perf_counter() - start) * 1e3

    def drain(self) -> None:
        while (held := [one for one in tuple(self._unfinished) if one._job is not None]) and self._is_alive():
            if held[-1].done:
                time.sleep(SETTLE_S)  # the device still uses what the job holds
            else:
                held[-1]._wait_briefly()

    def _is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        self._closed = True
        self._end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_S)
            self._mailbox.cancelled = True  # timeout: the current job is the last one

    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, unless at most `depth` jobs are unfinished, they finish in
        order, the worker's queue holds no others, and the worker lives unless it was closed or has failed."""
        # The worker runs meanwhile. The order of reads ensures that its progress can't cause a false alarm.
        with self._submitting:
            if (unfinished := len(self._unfinished)) > self.depth:
                raise IntegrityError(f"at most {self.depth} jobs may be unfinished, found {unfinished}")
            done = [ticket.done for ticket in reversed(self._unfinished)]
            if done != sorted(done):
                raise IntegrityError(f"a job is done before one submitted earlier; last to first: {done}")
            queued = self._mailbox.jobs.qsize()
            queued -= not self._end.alive  # close() queues an end marker as well
            if queued > (undone := done.count(False)):
                raise IntegrityError(f"{undone} jobs are not done, found {queued} in the queue")
            alive = self._thread is None or self._thread.is_alive()
            if not alive and self._mailbox.error is None and not self._closed:
                raise IntegrityError("the prefetch thread is gone, and left no error")

    def _start(self) -> None:
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._thread = threading.Thread(
            target=_work, args=(self._mailbox, self.device), name="attention-predictor-prefetch", daemon=True
        )
        self._thread.start()

    def _check(self, ticket: Ticket | None = None) -> None:
        """Raises FetchError if a job failed or the worker is gone; without a ticket, also when closed."""
        # Read before `done` and `error`: a worker may finish a job and end in between.
        alive = self._thread is None or self._thread.is_alive()
        if (error := self._mailbox.error) is not None:
            raise FetchError(f"a fetch failed: {error!r}") from error
        over = self._mailbox.cancelled or not alive
        if self._closed and (ticket is None or (over and not ticket.done)):
            raise FetchError(CLOSED)
        if not alive and not self._closed:
            raise FetchError("the prefetch thread is gone")


def make_prefetcher(kind: str, device: torch.device | str) -> Prefetcher:
    """The prefetcher for a configuration's `prefetch`.

    Captured steps fetch by themselves; the thread serves all other forwards.
    """
    return SyncPrefetcher() if kind == "none" else ThreadPrefetcher(device)


def _work(mailbox: _Mailbox, device: torch.device) -> None:
    """The worker thread: runs jobs until the end marker or a failure.

    It ends at the first failure, so that no later job runs.
    """
    try:
        with _own_stream(device):
            while (ticket := mailbox.jobs.get()) is not None and not mailbox.cancelled:
                _run_ordered(ticket)
                del ticket  # else the job's tensors would live until the next job
    except BaseException as error:  # SystemExit too: the waiting thread must see it
        mailbox.error = error


def _own_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def _run_ordered(ticket: Ticket) -> None:
    if ticket._submitted is None:
        ticket._run()
        ticket._job = None
        ticket._finish()
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(ticket._submitted)
    ticket._run()
    ticket._finished = stream.record_event()
    ticket._finish()
    # Keep the job's tensors alive until the device has used them.
    ticket._finished.synchronize()
    ticket._job = None
