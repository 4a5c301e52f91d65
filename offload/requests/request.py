"""A request, what a stream says of it, and its state while it is in progress.

Suffixes: B sequences (1), T tokens, V vocabulary; 2 is a token and whether its logits were all numbers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.errors import ConfigError, LogitsError
from attention_predictor.kinds import SEED
from attention_predictor.offload.generation import Sampling, next_logits
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.forwards import cached_length, check_positions
from attention_predictor.offload.inputs import COUNT, check, check_vocabulary, ids_of_one, token_list
from attention_predictor.offload.requests.prefix import Prefix
from attention_predictor.offload.runtime import Runtime

Reason = Literal["eos", "length", "cancelled", "failed"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt, and how to continue it.

    Attributes:
        input_ids: Token ids of the prompt, or of what comes after ``prefix``: int64 ``[T]``, or a list.
        max_new_tokens: New tokens at most.
        sampling: How tokens are chosen; greedy by default.
        eos_token_id: Ends the request; ``None``: from the model's generation config.
        seed: Seed of its random numbers; ``None``: torch's global state.
        id: Its name in ``engine.stats``; ``None``: its number in the stream.
        prefix: Tokens that the prompt begins with, which ``engine.prefill`` has read.

    Raises:
        ConfigError: An empty prompt, one of another shape, less than one new token, or a value of another type.
    """

    input_ids: Tensor | Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: int | Sequence[int] | None = None
    seed: int | None = None
    id: object = None
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        _ = self.ids_T
        check("max_new_tokens", self.max_new_tokens, COUNT)
        check("seed", self.seed, SEED, or_none=True)
        token_list(self.eos_token_id)
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"sampling={self.sampling!r} is not allowed: expected an object of Sampling")
        if not isinstance(self.prefix, Prefix | None):
            raise ConfigError(f"prefix={self.prefix!r} is not allowed: expected what engine.prefill returned, or None")

    @cached_property
    def ids_T(self) -> Tensor:
        """``input_ids`` as a tensor."""
        return ids_of_one(self.input_ids, "request")


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


class Running:
    """A request in progress.

    Attributes:
        prefilled: Whether the cache holds the whole prompt.
        placed: Whether it has a place in a batch, and no cache of its own any more.
        chosen: Tokens on their way to the host, and the events after which they are there (``None``: they are).
    """

    def __init__(self, model: PreTrainedModel, runtime: Runtime, request: Request, number: int) -> None:
        if not isinstance(request, Request):
            raise ConfigError(f"stream takes objects of Request, got {type(request).__name__}")
        self.model, self.runtime, self.request = model, runtime, request
        self.name = number if request.id is None else request.id
        self.ids_T = request.ids_T
        if request.prefix is not None:
            self.ids_T = torch.cat([request.prefix.ids_T, self.ids_T.cpu()])
        settings = model.generation_config
        eos = settings.eos_token_id if request.eos_token_id is None else request.eos_token_id
        self.ends = frozenset(token_list(eos))
        self.chosen: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.prefilled = False
        self.placed = False
        self._cache: TieredCache | None = None
        self._cached = self._chosen_tokens = self.new_tokens = 0
        self._arrived_s = time.perf_counter()
        self._first_s = self._last_s = 0.0

    @property
    def final_length(self) -> int:
        """Tokens that the cache will hold at most."""
        return cached_length(len(self.ids_T), self.request.max_new_tokens)

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
        check_vocabulary(self.runtime, self.request.ids_T)
        prefix = self.request.prefix
        if prefix is not None and prefix.runtime is not self.runtime:
            raise ConfigError("prefix: another engine has read it; expected one that this engine's prefill returned")
        check_positions(self.runtime.text_config, self.final_length)

    def begin(self) -> None:
        """Take an empty cache, or a copy of the prefix's."""
        device, seed, prefix = self.runtime.device, self.request.seed, self.request.prefix
        if prefix is None:
            self._cache = TieredCache(self.runtime)
        else:
            self._cache, self._cached = prefix.copy(), len(prefix.ids_T)
        self.runtime.room.promise(self._cache, batch=1, tokens=self.final_length)
        self._ids_BT = self.ids_T.to(device=device, dtype=torch.int64)[None]
        self._generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    @property
    def shared_tokens(self) -> int:
        """First tokens whose host memory its prefix has already."""
        return 0 if self.request.prefix is None else self.request.prefix.shared_tokens

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that it has, of its own or with its place."""
        held = self.final_length if self.placed else self.cache.room
        return self.runtime.room.bytes_for(1, held) if held else 0

    @property
    def cache(self) -> TieredCache:
        """Its own cache."""
        assert self._cache is not None
        return self._cache

    def leave_cache(self) -> None:
        """Its next steps are the batch's, and so is its host memory."""
        self.placed, self._cache = True, None

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


def to_host(token_B1: Tensor, logits_BV: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Chosen tokens and whether their logits are all numbers, and the event after which the host has them."""
    found_B2 = torch.cat([token_B1, ~logits_BV.isnan().any(-1, keepdim=True)], 1)
    if not found_B2.is_cuda:
        return found_B2, None
    on_host_B2 = torch.empty(found_B2.shape, dtype=torch.int64, pin_memory=True)
    on_host_B2.copy_(found_B2, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return on_host_B2, event
