"""Requests: prompts of any lengths, generated side by side without padding.

A round is one chunk of the oldest unfinished prompt, then one step of every request whose prompt is done. So requests
begin and end at any time, and none waits for more than one chunk. A prompt is read in a cache of its own. Then the
request joins the others' captured step (``RequestBatch``). Where it can't, it takes steps of its own, and the model's
weights are read once for each.

Suffixes: B sequences (1), T tokens, V vocabulary; 2 is a token and whether its logits were all numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.errors import ConfigError, ContextLengthError, HostMemoryError, LogitsError, one_line
from attention_predictor.offload.generation import Sampling, next_logits, token_list
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.forwards import check_positions
from attention_predictor.offload.hf.graph import CapturedSteps, is_ready
from attention_predictor.offload.request_batch import RequestBatch, batch_of, to_host
from attention_predictor.offload.runtime import Runtime

Reason = Literal["eos", "length", "cancelled", "failed"]
# Errors of one request; others go on. Any other error ends the stream.
OWN_ERRORS = (ConfigError, ContextLengthError, HostMemoryError, LogitsError, MemoryError, torch.OutOfMemoryError)
Own = TypeVar("Own", bound=BaseException)
PLACES = 8  # requests in progress at most, by default


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt, and how to continue it.

    Attributes:
        input_ids: Token ids of the prompt: int64 ``[T]``, or a list.
        max_new_tokens: New tokens at most.
        sampling: How tokens are chosen; greedy by default.
        eos_token_id: Ends the request; ``None``: from the model's generation config.
        seed: Seed of its random numbers; ``None``: torch's global state.
        id: Its name in ``engine.stats``; ``None``: its number in the stream.

    Raises:
        ConfigError: An empty prompt, one of another shape, or less than one new token.
    """

    input_ids: Tensor | Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: int | Sequence[int] | None = None
    seed: int | None = None
    id: object = None

    def __post_init__(self) -> None:
        ids = self.input_ids
        if (ids.dim() != 1 if isinstance(ids, Tensor) else isinstance(ids, str)) or len(ids) == 0:
            found = list(ids.shape) if isinstance(ids, Tensor) else repr(ids)
            raise ConfigError(f"input_ids of a request must be [tokens] with at least one token, got {found}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} is not allowed: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a request ended.

    Attributes:
        reason: ``eos``, ``length`` (``max_new_tokens``), ``cancelled`` or ``failed``.
        error: Why it failed; else ``None``.
        prompt_tokens, new_tokens: Tokens of the prompt, and new ones, including those that a cancellation discarded.
        first_token_s: Seconds from when the stream took the request to its first token; ``None`` without one.
        tokens_per_s: Tokens a second after the first one; ``None`` for fewer than two.
    """

    reason: Reason
    error: BaseException | None
    prompt_tokens: int
    new_tokens: int
    first_token_s: float | None
    tokens_per_s: float | None


class Event(NamedTuple):
    """A new token of a request, its ending, or both.

    Attributes:
        token: ``None`` where a request was cancelled or failed.
        ending: Set in the request's last event.
    """

    request: Request
    token: int | None
    ending: Ending | None


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
        given = {"places": places, "max_length": max_length, "prefill_chunk_size": prefill_chunk_size}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not allowed: expected at least 1")
        self.model, self.runtime, self.captured = model, runtime, captured
        self.places, self.max_length, self.chunk = places, max_length, prefill_chunk_size
        self._batch: RequestBatch | None = None
        self._why_no_batch: str | None = None if places > 1 else "there is one place"
        self._requests = enumerate(requests)
        self._next: Running | None = None  # taken, waits for memory
        self._running: list[Running] = []  # in the order of arrival
        self._events: deque[Event] = deque()
        self._cancelled: set[Request] = set()
        self._exhausted = False

    def cancel(self, request: Request) -> None:
        """End a request. Its next event is its ending. Any thread may call this, also before the request is taken.

        Nothing happens if the request has ended.
        """
        self._cancelled.add(request)

    def close(self) -> None:
        """Drop all requests and free their memory."""
        self.runtime.drain()  # fetches in progress would keep it
        for one in self._running:
            one.batch = None  # a cycle would keep the places' memory
        self._running, self._next, self._exhausted, self._batch = [], None, True, None
        self._events.clear()
        self.runtime.drain()

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
                elif one.prefilled and one.batch is None:
                    one.step()
                if one.prefilled and one.batch is None and not one.steps_are_over:
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
        longest = max(other.final_length for other in self._running)
        if self._batch is None or (self._batch.is_empty and not self._batch.has_place_for(one)):
            self._batch = None  # its places are too short for this one; its memory is free for others
            sizes = self.places, self.max_length or longest, self._promised()
            found = batch_of(self.model, self.captured, one, *sizes)
            if isinstance(found, str):
                self._why_no_batch = found
                self.runtime.note_fallback(f"a step of its own for each request: {found}")
                return
            self._batch = found
        if self._batch.has_place_for(one):
            self._batch.join(one)
            one.enter(self._batch)
            self.runtime.drain()  # a fetch in progress would keep the memory of the cache that it leaves

    def _end_batch(self, error: BaseException) -> None:
        """End the requests that shared a step which failed: what their places hold is unknown. Others go on."""
        for one in [one for one in self._running if one.batch is not None]:
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
                number, request = next(self._requests, (-1, None))
                if request is None:
                    self._exhausted = True
                    return
                self._next = Running(self.model, self.runtime, request, number)
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
        check, whole = self.runtime.room.check, {"batch": 1, "tokens": one.final_length, "room": 0}
        held = sum(other.host_bytes()[0] for other in self._running)
        check(**whole, promised=-held - (self._batch.host_bytes if self._batch is not None else 0))
        while True:
            try:
                check(**whole, promised=self._promised())
                return True
            except HostMemoryError:
                if self._running:
                    return False
                if self._batch is None:
                    raise
                self._batch = None  # nobody has a place
                self.runtime.drain()

    def _promised(self) -> int:
        """Bytes of host memory that the requests in progress will still take."""
        return sum(max(final - held, 0) for held, final in (one.host_bytes() for one in self._running))

    def _end(
        self, one: Running, reason: Reason, error: BaseException | None = None, *, token: int | None = None
    ) -> None:
        """Forget the request, whose memory is then free, count it, and yield its ending."""
        self.runtime.drain()  # a fetch in progress would keep its memory, and the next request needs that
        if one.batch is not None:
            one.batch.leave(one)
            one.batch = None
        if one is self._next:
            self._next = None
        else:
            self._running.remove(one)
        self.runtime.drain()  # a fetch in progress holds its blocks
        self._cancelled.discard(one.request)
        stats = self.runtime.stats
        stats.requests[reason] += 1
        if reason in ("cancelled", "failed"):
            why = "" if error is None else f": {one_line(error)}"
            stats.unfinished_requests.append(f"request {one.name} {reason} after {one.new_tokens} tokens{why}")
        self._events.append(Event(one.request, token, one.ending(reason, error)))


class Running:
    """A request in progress.

    Attributes:
        prefilled: Whether the cache holds the whole prompt.
        batch: The batch whose step it shares; ``None`` while it has a cache of its own.
        chosen: Tokens on their way to the host, and the events after which they are there (``None``: they are).
    """

    def __init__(self, model: PreTrainedModel, runtime: Runtime, request: Request, number: int) -> None:
        if not isinstance(request, Request):
            raise ConfigError(f"stream takes objects of Request, got {type(request).__name__}")
        self.model, self.runtime, self.request = model, runtime, request
        self.name = number if request.id is None else request.id
        self.ids_T = torch.as_tensor(request.input_ids)
        settings = model.generation_config
        eos = settings.eos_token_id if request.eos_token_id is None else request.eos_token_id
        self.ends = frozenset(token_list(eos))
        self.chosen: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.prefilled = False
        self.batch: RequestBatch | None = None
        self._cache: TieredCache | None = None
        self._cached = self._chosen_tokens = self.new_tokens = 0
        self._arrived_s = time.perf_counter()
        self._first_s = self._last_s = 0.0

    @property
    def final_length(self) -> int:
        """Tokens that the cache will hold at most; the last one chosen is never read."""
        return len(self.ids_T) + self.request.max_new_tokens - 1

    @property
    def steps_are_over(self) -> bool:
        return self._chosen_tokens == self.request.max_new_tokens

    @property
    def has_arrived(self) -> bool:
        """Whether the oldest chosen token is on the host."""
        event = self.chosen[0][1]
        return event is None or event.query()

    def check(self) -> None:
        """Raise for a prompt that the model can't read."""
        if self.ids_T.is_floating_point() or self.ids_T.dtype == torch.bool:
            raise ConfigError(f"input_ids of a request must be whole numbers, got {self.ids_T.dtype}")
        vocabulary = self.runtime.text_config.vocab_size
        least, most = (int(end) for end in self.ids_T.aminmax())
        if least < 0 or most >= vocabulary:
            found = least if least < 0 else most
            raise ConfigError(f"token {found} in input_ids: the model has tokens from 0 to {vocabulary - 1}")
        check_positions(self.runtime.text_config, self.final_length)

    def begin(self) -> None:
        """Take an empty cache."""
        device, seed = self.runtime.device, self.request.seed
        self._cache = TieredCache(self.runtime)
        self._ids_BT = self.ids_T.to(device=device, dtype=torch.int64)[None]
        self._generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def host_bytes(self) -> tuple[int, int]:
        """Bytes of host memory that the cache has now, and at its final length."""
        if self._cache is None:
            return 0, 0  # its place has its memory
        room, held = self.runtime.room, self._cache.room
        return room.bytes_for(1, held) if held else 0, room.bytes_for(1, self.final_length)

    @property
    def cache(self) -> TieredCache:
        """Its own cache."""
        assert self._cache is not None
        return self._cache

    def enter(self, batch: RequestBatch) -> None:
        """Leave its own cache: its next steps are the batch's."""
        self.batch, self._cache = batch, None

    def prefill(self, chunk: int | None) -> None:
        """Read the next ``chunk`` tokens of the prompt (``None``: all of it)."""
        stop = len(self.ids_T) if chunk is None else min(self._cached + chunk, len(self.ids_T))
        logits_BV = next_logits(self.model, self.cache, self._ids_BT[:, self._cached : stop])
        self._cached = stop
        if stop == len(self.ids_T):
            self.prefilled = True
            self._take_step(logits_BV)

    def step(self) -> None:
        """Read the newest token and choose the next one."""
        if self.steps_are_over:
            return
        position_B1 = torch.full_like(self.token_B1, self._cached)
        logits_BV = next_logits(self.model, self.cache, self.token_B1, position_BT=position_B1)
        self._cached += 1
        self._take_step(logits_BV)

    def _take_step(self, logits_BV: Tensor) -> None:
        self.token_B1 = self.choose(logits_BV)
        found_B2, event = to_host(self.token_B1, logits_BV)
        self.count_step(found_B2[0], event)

    def choose(self, logits_BV: Tensor) -> Tensor:
        """The token that follows, ``[1, 1]``."""
        return self.request.sampling.choose(logits_BV, self._generator)

    def count_step(self, found_2: Tensor, event: torch.cuda.Event | None) -> None:
        """Note a chosen token, on its way to the host."""
        self.chosen.append((found_2, event))
        self._chosen_tokens += 1

    def take(self) -> int:
        """The oldest chosen token, once it has arrived. Raises LogitsError if its logits were NaN."""
        found_2, event = self.chosen.popleft()
        if event is not None:
            event.synchronize()
        token, sound = found_2.tolist()
        if not sound:
            raise LogitsError("its logits are NaN")
        self._last_s = time.perf_counter()
        if self.new_tokens == 0:
            self._first_s = self._last_s
        self.new_tokens += 1
        return token

    def reason_to_end(self, token: int) -> Reason | None:
        """Why the token just taken ends the request, or ``None``."""
        if token in self.ends:
            return "eos"
        return "length" if self.new_tokens == self.request.max_new_tokens else None

    def ending(self, reason: Reason, error: BaseException | None) -> Ending:
        n = self.new_tokens
        return Ending(
            reason=reason,
            error=error,
            prompt_tokens=len(self.ids_T),
            new_tokens=n,
            first_token_s=self._first_s - self._arrived_s if n else None,
            tokens_per_s=(n - 1) / max(self._last_s - self._first_s, 1e-9) if n > 1 else None,
        )


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
    return [
        torch.cat([torch.as_tensor(one.input_ids).to(device), torch.tensor(new[one], device=device)])
        for one in requests
    ]
