"""Requests: prompts of any lengths, generated side by side without padding.

A round is one chunk of the oldest unfinished prompt, then one step of every request whose prompt is done. So requests
begin and end at any time, and none waits for more than one chunk. A prompt is read in a cache of its own. Then the
request joins the others' captured step (``RequestBatch``). Where it can't, it takes steps of its own, and the model's
weights are read once for each.

Suffixes: T tokens.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.errors import ConfigError, ContextLengthError, HostMemoryError, LogitsError, one_line
from attention_predictor.offload.hf.graph import CapturedSteps, is_ready
from attention_predictor.offload.hf.places import why_masked
from attention_predictor.offload.inputs import COUNT, check
from attention_predictor.offload.requests.batch import RequestBatch, batch_of
from attention_predictor.offload.requests.request import Event, Reason, Request, Running
from attention_predictor.offload.runtime import Runtime

# Errors of one request; others go on. Any other error ends the stream.
OWN_ERRORS = (ConfigError, ContextLengthError, HostMemoryError, LogitsError, MemoryError, torch.OutOfMemoryError)
Own = TypeVar("Own", bound=BaseException)
PLACES = 8  # requests in progress at most, by default


class Stream(Iterator[Event]):
    """Yields tokens of requests as they come; see ``Engine.stream``. Dropping or closing it frees its memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        runtime: Runtime,
        captured: CapturedSteps | None,
        requests: Iterable[Request],
        *,
        places: int,
        max_length: int | None,
        prefill_chunk_size: int | None,
    ) -> None:
        if runtime.ranks.count > 1:
            raise ConfigError(f"stream: a model divided among {runtime.ranks.count} processes is not supported")
        check("prefill_chunk_size", prefill_chunk_size, COUNT, or_none=True)
        check("places", places, COUNT)
        check("max_length", max_length, COUNT, or_none=True)
        if not isinstance(requests, Iterable):
            raise ConfigError(f"stream takes several requests, such as a list, got {type(requests).__name__}")
        self.model, self.runtime, self.captured = model, runtime, captured
        self.places, self.max_length, self.chunk = places, max_length, prefill_chunk_size
        self._batch: RequestBatch | None = None
        self._why_no_batch: str | None = None if places > 1 else "there is one place"
        self._requests = enumerate(requests)
        self._next: Running | None = None  # taken, waits for memory
        self._running: list[Running] = []  # in the order of arrival
        self._events: deque[Event] = deque()
        self._cancelled: weakref.WeakSet[Request] = weakref.WeakSet()
        self._taken: weakref.WeakSet[Request] = weakref.WeakSet()
        self._exhausted = False

    def cancel(self, request: Request) -> None:
        """End a request. Its next event is its ending. Any thread may call this, also before the request is taken.

        Nothing happens if the request has ended.
        """
        if not isinstance(request, Request):
            raise ConfigError(f"cancel takes an object of Request, got {type(request).__name__}")
        self._cancelled.add(request)

    def close(self) -> None:
        """Drop all requests and free their memory."""
        self.runtime.drain()  # fetches in progress would keep it
        self._running, self._next, self._exhausted, self._batch = [], None, True, None
        self._events.clear()

    def __next__(self) -> Event:
        while True:
            while self._events:
                event = self._events.popleft()
                if event.ending is not None or event.request not in self._cancelled:
                    return event
            if self._exhausted and not self._running and self._next is None:
                self.close()
                raise StopIteration
            try:
                self._round()
            except BaseException:
                self.close()
                raise

    @torch.no_grad()
    def _round(self) -> None:
        self._admit()
        for one in [*self._running, *([self._next] if self._next is not None else [])]:
            if one.request in self._cancelled:
                self._end(one, "cancelled")
        prefilling = next((one for one in self._running if not one.prefilled), None)
        if self._batch is not None:
            try:
                self._batch.step()
            except OWN_ERRORS as error:
                self._end_batch(without_frames(error))
        for one in list(self._running):
            try:
                if one is prefilling:
                    one.prefill(self.chunk)
                elif one.prefilled and not one.placed:
                    one.step()
                if one.prefilled and not one.placed and not one.steps_are_over:
                    self._find_place(one)
            except OWN_ERRORS as error:
                failure: BaseException | None = without_frames(error)
            else:
                failure = None
            # Tokens that were chosen before the failure are valid, and one of them may have ended the request.
            self._take_tokens(one, wait=failure is not None or one.steps_are_over)
            if failure is not None and one in self._running:
                self._end(one, "failed", failure)

    def _find_place(self, one: Running) -> None:
        """Let a prefilled request join the others' step, if there is a place for it."""
        if self._why_no_batch is not None or not is_ready(one.cache):
            return
        if self.captured is not None and why_masked(one.cache) is not None:
            return  # its own steps say why: others may share theirs
        longest = max(other.final_length for other in self._running)
        if self._batch is None or (self._batch.is_empty and not self._batch.has_place_for(one)):
            self._batch = None  # its places are too short for this one; its memory is free for others
            found = batch_of(self.model, self.captured, one, self.places, self.max_length or longest)
            if isinstance(found, str):
                self._why_no_batch = found
                self.runtime.note_fallback(f"a step of its own for each request: {found}")
                return
            self._batch = found
        if self._batch.has_place_for(one):
            self._batch.join(one)
            one.leave_cache()
            self.runtime.drain()  # a fetch in progress would keep the memory of the cache that it leaves

    def _end_batch(self, error: BaseException) -> None:
        """End the requests that shared a step which failed: what their places hold is unknown. Others go on."""
        for one in [one for one in self._running if one.placed]:
            self._take_tokens(one, wait=True)  # chosen before the failure: valid
            if one in self._running:
                self._end(one, "failed", error)
        self._batch = None

    def _take_tokens(self, one: Running, *, wait: bool) -> None:
        """Yield the request's chosen tokens; ``wait`` also for the newest, which the device may still compute."""
        while len(one.chosen) > 1 or (one.chosen and (wait or one.has_arrived)):
            try:
                token = one.take()
            except LogitsError as error:
                self._end(one, "failed", without_frames(error))
                return
            reason = one.reason_to_end(token)
            if reason is not None:
                self._end(one, reason, token=token)
                return
            self._events.append(Event(one.request, token, None))

    # ---- admission and endings -------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take requests while there are places and memory."""
        while len(self._running) < self.places:
            if self._next is None:
                if (numbered := next(self._requests, None)) is None:
                    self._exhausted = True
                    return
                number, request = numbered
                self._next = Running(self.model, self.runtime, request, number)
                if request in self._taken:
                    raise ConfigError(
                        f"request {self._next.name} was in this stream before: its events would be mixed up"
                    )
                self._taken.add(request)
            one = self._next
            if one.request in self._cancelled:
                self._end(one, "cancelled")
                continue
            try:
                one.check()
                if not self._fits(one):
                    return
                one.begin()
            except OWN_ERRORS as error:
                self._end(one, "failed", without_frames(error))
                continue
            self._running.append(one)
            self._next = None

    def _fits(self, one: Running) -> bool:
        """Whether there is memory for the whole request, beside what the running ones will still take.

        Raises HostMemoryError if there would not be enough without the running ones either.
        """
        room = self.runtime.room
        held = sum(other.host_bytes for other in self._running)
        shared = room.slab_bytes(1, one.shared_tokens)  # the prefix has them
        room.check(batch=1, tokens=one.final_length, room=0, promised=-held - shared)
        if not self._running:
            return True
        promised = room.promised_beside(None) - shared
        try:
            room.check(batch=1, tokens=one.final_length, room=0, promised=promised, settled=True)  # by ``_end``
        except HostMemoryError:
            return False
        return True

    def _end(
        self, one: Running, reason: Reason, error: BaseException | None = None, *, token: int | None = None
    ) -> None:
        """Forget the request, whose memory is then free, count it, and yield its ending."""
        self.runtime.drain()  # a fetch in progress would keep its memory, and the next request needs that
        if one.placed and self._batch is not None:
            self._batch.leave(one)
        if one is self._next:
            self._next = None
        else:
            self._running.remove(one)
        self._cancelled.discard(one.request)
        stats = self.runtime.stats
        stats.requests[reason] += 1
        if reason in ("cancelled", "failed"):
            why = "" if error is None else f": {one_line(error)}"
            stats.unfinished_requests.append(f"request {one.name} {reason} after {one.new_tokens} tokens{why}")
        self._events.append(Event(one.request, token, one.ending(reason, error)))


def without_frames(error: Own) -> Own:
    """The error without its traceback, and those of its causes, whose frames would keep the request's cache alive."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def finish(stream: Stream, requests: Sequence[Request]) -> list[Tensor]:
    """Prompt and new tokens of each request of the stream, int64 ``[T + new]``. Raises the first error of a request."""
    new: dict[Request, list[int]] = {request: [] for request in requests}
    try:
        for request, token, ending in stream:
            if ending is not None and ending.error is not None:
                raise ending.error
            if token is not None:
                new[request].append(token)
    finally:
        stream.close()
    device = stream.runtime.device
    return [torch.cat([one.ids_T.to(device), torch.tensor(new[one], device=device)]) for one in requests]
