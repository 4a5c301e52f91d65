"""Requests: prompts of any lengths, generated side by side, each in a cache of its own.

A round is one chunk of the oldest unfinished prompt, then one step of every request whose prompt is done. So requests
begin and end at any time without padding, and none waits for more than one chunk. Steps are captured for each cache
separately, so a request that joins or leaves does not disturb those of the others. Weights are read once per request
and step: steps of different requests are not merged into one batch.

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
        requests: Iterable[Request],
        *,
        places: int,
        prefill_chunk_size: int | None,
    ) -> None:
        if runtime.ranks.count > 1:
            raise ConfigError(f"stream: a model divided among {runtime.ranks.count} processes is not supported")
        for name, value in (("places", places), ("prefill_chunk_size", prefill_chunk_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not allowed: expected at least 1")
        self.model, self.runtime, self.places, self.chunk = model, runtime, places, prefill_chunk_size
        self._requests = enumerate(requests)
        self._next: _Running | None = None  # taken, waits for memory
        self._running: list[_Running] = []  # in the order of arrival
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
        self.runtime.prefetcher.drain()  # fetches in progress would keep it
        self._running, self._next, self._exhausted = [], None, True
        self._events.clear()
        self.runtime.prefetcher.drain()

    def __next__(self) -> Event:
        while True:
            while self._events:
                event = self._events.popleft()
                if event.ending is not None or event.request not in self._cancelled:
                    return event
            if self._exhausted and not self._running and self._next is None:
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
        for one in list(self._running):
            try:
                if one is prefilling:
                    one.prefill(self.chunk)
                elif one.prefilled:
                    one.step()
            except OWN_ERRORS as error:
                failure: BaseException | None = without_frames(error)
            else:
                failure = None
            # Tokens that were chosen before the failure are valid, and one of them may have ended the request.
            self._take_tokens(one, wait=failure is not None or one.steps_are_over)
            if failure is not None and one in self._running:
                self._end(one, "failed", failure)

    def _take_tokens(self, one: _Running, *, wait: bool) -> None:
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
                self._next = _Running(self.model, self.runtime, request, number)
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

    def _fits(self, one: _Running) -> bool:
        """Whether there is memory for the whole request, beside what the running ones will still take.

        Raises HostMemoryError if there would not be enough without the running ones either.
        """
        check, sizes = self.runtime.room.check, [other.host_bytes() for other in self._running]
        whole = {"batch": 1, "tokens": one.final_length, "room": 0}
        check(**whole, promised=-sum(held for held, _ in sizes))
        try:
            check(**whole, promised=sum(max(final - held, 0) for held, final in sizes))
        except HostMemoryError:
            if not self._running:
                raise
            return False
        return True

    def _end(
        self, one: _Running, reason: Reason, error: BaseException | None = None, *, token: int | None = None
    ) -> None:
        """Forget the request, whose memory is then free, count it, and yield its ending."""
        self.runtime.prefetcher.drain()  # a fetch in progress would keep its memory, and the next request needs that
        if one is self._next:
            self._next = None
        else:
            self._running.remove(one)
        self.runtime.prefetcher.drain()  # a fetch in progress holds its blocks
        self._cancelled.discard(one.request)
        stats = self.runtime.stats
        stats.requests[reason] += 1
        if reason in ("cancelled", "failed"):
            why = "" if error is None else f": {one_line(error)}"
            stats.unfinished_requests.append(f"request {one.name} {reason} after {one.new_tokens} tokens{why}")
        self._events.append(Event(one.request, token, one.ending(reason, error)))


class _Running:
    """A request in progress.

    Attributes:
        prefilled: Whether the cache holds the whole prompt.
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
        room, held = self.runtime.room, self._cache.room
        return room.bytes_for(1, held) if held else 0, room.bytes_for(1, self.final_length)

    def prefill(self, chunk: int | None) -> None:
        """Read the next ``chunk`` tokens of the prompt (``None``: all of it)."""
        stop = len(self.ids_T) if chunk is None else min(self._cached + chunk, len(self.ids_T))
        logits_BV = next_logits(self.model, self._cache, self._ids_BT[:, self._cached : stop])
        self._cached = stop
        if stop == len(self.ids_T):
            self.prefilled = True
            self._choose(logits_BV)

    def step(self) -> None:
        """Read the newest token and choose the next one."""
        if self.steps_are_over:
            return
        position_B1 = torch.full_like(self._token_B1, self._cached)
        logits_BV = next_logits(self.model, self._cache, self._token_B1, position_BT=position_B1)
        self._cached += 1
        self._choose(logits_BV)

    def _choose(self, logits_BV: Tensor) -> None:
        self._token_B1 = self.request.sampling.choose(logits_BV, self._generator)
        sound = ~logits_BV.isnan().any()
        found_2, event = torch.stack([self._token_B1.view(()), sound.to(torch.int64)]), None
        if found_2.is_cuda:
            on_host_2 = torch.empty(2, dtype=torch.int64, pin_memory=True)
            found_2, event = on_host_2.copy_(found_2, non_blocking=True), torch.cuda.Event()
            event.record()
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
