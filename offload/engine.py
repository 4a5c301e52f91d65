"""Engine: the handle of an attached model. It generates, reports statistics, and detaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.errors import ConfigError
from attention_predictor.kinds import SEED, whole
from attention_predictor.offload.generation import Sampling, generate
from attention_predictor.offload.hf.attachment import Attachment
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.forwards import cached_length, check_positions
from attention_predictor.offload.hf.graph import CapturedSteps
from attention_predictor.offload.inputs import COUNT, check, check_batch, check_vocabulary, token_list
from attention_predictor.offload.requests.prefix import Prefix, read_prefix
from attention_predictor.offload.requests.request import Request
from attention_predictor.offload.requests.stream import PLACES, Stream, finish
from attention_predictor.offload.runtime import Runtime
from attention_predictor.offload.stats import Stats


class Engine:
    """An attached model. Use as a context manager, or call ``detach``.

    Attributes:
        model: The attached model.
        config: The settings.
        runtime: What the caches share.
    """

    def __init__(
        self, model: PreTrainedModel, runtime: Runtime, attachment: Attachment, captured: CapturedSteps | None
    ) -> None:
        self.model, self.runtime, self.config = model, runtime, runtime.config
        self._attachment, self.captured = attachment, captured

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs: of a model on several devices, the first one's."""
        return self.runtime.device

    @property
    def attached(self) -> bool:
        """True until ``detach``."""
        return self.runtime.open

    @property
    def tiered_layers(self) -> frozenset[int]:
        """Numbers of the layers whose cache is in host memory."""
        return self.runtime.tiered_layers

    @property
    def stats(self) -> Stats:
        """The statistics so far, the next token's fetches included. Steps count on the device: read it anew."""
        self.runtime.drain()
        for stage in self.runtime.stages:
            stage.counts.move_into(self.runtime.stats)
        return self.runtime.stats

    def new_cache(self) -> TieredCache:
        """An empty cache for direct calls of the model."""
        self.runtime.check_open()
        return TieredCache(self.runtime)

    @overload
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        prefill_chunk_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Sequence[Tensor | Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        prefill_chunk_size: int | None = None,
        seed: int | None = None,
    ) -> list[Tensor]: ...

    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor | Sequence[int]],
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        prefill_chunk_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Continue prompts by a minimal loop that chooses tokens on the device and hardly waits for it.

        ``model.generate`` has more features, but waits for the device at every token.

        Args:
            input_ids: int64 ``[B, T]``; shorter prompts are padded on the left, with zeros in ``attention_mask``. Or a
                list of prompts of any lengths, each a list or int64 ``[T]``: they run without padding, as by
                ``stream``.
            max_new_tokens: New tokens at most.
            temperature, top_k, top_p: ``Sampling``; a temperature of 0 is greedy.
            eos_token_id: Ends a sequence; ``None``: from the model's generation config.
            pad_token_id: Fills sequences that end before others; ``None``: from the model's generation config.
            prefill_chunk_size: Prompt tokens per forward; ``None``: the whole prompt.
            seed: Seed of the random numbers; ``None``: torch's global state. Ranks use that of the first. In a list
                each prompt begins with this seed.

        Returns:
            int64 ``[B, T + new]``, prompts included. For a list: a list of int64 ``[T + new]``, each until its own end.

        Raises:
            ConfigError: An argument that is not allowed.
            ContextLengthError, HostMemoryError: See ``check_fits``; of a list, if a prompt does not fit alone.
            LogitsError: The logits of a prompt in a list are NaN.
        """
        self.runtime.check_open()
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        if not isinstance(input_ids, Tensor):
            if attention_mask is not None or pad_token_id is not None:
                raise ConfigError(
                    "attention_mask and pad_token_id are for padded batches: a list of prompts has no padding"
                )
            if not isinstance(input_ids, Iterable):
                raise ConfigError(f"input_ids must be a tensor or a list of prompts, got {type(input_ids).__name__}")
            requests = [
                Request(
                    input_ids=ids,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    eos_token_id=eos_token_id,
                    seed=seed,
                )
                for ids in input_ids
            ]
            for request in requests:
                check_vocabulary(self.runtime, request.ids_T)
                self.check_fits(batch=1, tokens=cached_length(len(request.ids_T), max_new_tokens))
            places = max(min(PLACES, len(requests)), 1)
            return finish(self.stream(requests, places=places, prefill_chunk_size=prefill_chunk_size), requests)
        check("max_new_tokens", max_new_tokens, COUNT)
        check("prefill_chunk_size", prefill_chunk_size, COUNT, or_none=True)
        check("seed", seed, SEED, or_none=True)
        check_batch(self.runtime, input_ids, attention_mask)
        known_tokens = whole(0, self.runtime.text_config.vocab_size - 1)
        check("pad_token_id", pad_token_id, known_tokens, or_none=True)
        batch, tokens = input_ids.shape
        self.check_fits(batch=batch, tokens=cached_length(tokens, max_new_tokens))
        settings = self.model.generation_config
        ends = token_list(settings.eos_token_id if eos_token_id is None else eos_token_id)
        paddings = (*token_list(pad_token_id, "pad_token_id"), settings.pad_token_id, *ends, 0)
        return generate(
            self.model,
            self.new_cache(),
            input_ids.to(self.device, torch.int64),
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            sampling=sampling,
            ends=ends,
            pad_token_id=next(token for token in paddings if known_tokens.expected(token) is None),
            prefill_chunk_size=prefill_chunk_size,
            seed=self.runtime.ranks.same_seed(seed) if temperature > 0 else seed,
        )

    def prefill(self, input_ids: Tensor | Sequence[int], *, prefill_chunk_size: int | None = 4096) -> Prefix:
        """Read tokens that several requests begin with, such as a document, once: ``Request(prefix=…)``.

        Each such request begins with a copy. Copies share host memory, in whole slabs; on the device each has its own
        pool and policy state.

        Args:
            input_ids: int64 ``[T]``, or a list.
            prefill_chunk_size: Tokens per forward; ``None``: all.

        Raises:
            ConfigError: An argument that is not allowed.
            ContextLengthError, HostMemoryError: See ``check_fits``.
        """
        self.runtime.check_open()
        return read_prefix(self.model, self.runtime, input_ids, prefill_chunk_size)

    def stream(
        self,
        requests: Iterable[Request],
        *,
        places: int = PLACES,
        max_length: int | None = None,
        prefill_chunk_size: int | None = 4096,
    ) -> Stream:
        """Continue requests of any lengths side by side, without padding; yields their tokens as they come.

        A request is taken when there is a place and enough host memory for its whole length; else it waits, and so do
        those after it. Between two chunks of a new prompt every other request takes a step. A request that fails does
        not end the others: its last event says why, and ``engine.stats`` names it.

        On a GPU requests share one captured step, in which each has a place with room for the longest of them. A
        request takes steps of its own while it has fewer tokens than the sketch needs, where it is longer than the
        places, or where its steps can't be shared: with unequal budgets (as of PyramidKV, CAKE, TAPPA), in models with
        linear-attention layers, on several devices, or without kernels. ``engine.stats.fallbacks`` says so.

        Args:
            requests: Any iterable; the next one is taken as late as possible. An iterator that waits stops all.
            places: Requests that are in progress at most. Each needs device memory of its own. Fewer share a step if
                the device has no room for so many of ``max_length``.
            max_length: Tokens that a place has room for, prompt and new ones; ``None``: those of the longest request
                in progress when the first one has been read.
            prefill_chunk_size: Prompt tokens per forward; ``None``: the whole prompt.

        Returns:
            A ``Stream`` of events ``(request, token, ending)``, which also has ``cancel(request)`` and ``close()``.

        Raises:
            ConfigError: An argument that is not allowed, or a model divided among processes.
        """
        self.runtime.check_open()
        return Stream(
            self.model,
            self.runtime,
            self.captured,
            requests,
            places=places,
            max_length=max_length,
            prefill_chunk_size=prefill_chunk_size,
        )

    def check_fits(self, *, batch: int, tokens: int) -> None:
        """Refuse, before any work, a context that the model or the host memory can't hold.

        Args:
            batch: Number of sequences.
            tokens: Final length of each. The last generated token does not count: it is never cached.

        Raises:
            ContextLengthError: More tokens than the model has positions.
            HostMemoryError: The blocks would not fit in ``config.host_memory``, or in what the system has available.
        """
        check("batch", batch, COUNT)
        check("tokens", tokens, COUNT)
        check_positions(self.runtime.text_config, tokens)
        self.runtime.room.check(batch=batch, tokens=tokens, room=0)

    def detach(self) -> None:
        """Restore the model. Caches of this engine can't be used any more. Idempotent."""
        if not self.runtime.open:
            return
        self.runtime.open = False
        try:
            self._attachment.undo()  # first: the model is restored even if the rest fails
            if self.captured is not None:
                self.captured.leave()
        finally:
            self.runtime.close()

    def __enter__(self) -> Engine:
        self.runtime.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return (
            f"Engine({type(self.model).__name__}, {state}, policy={self.config.policy!r}, budget={self.config.budget})"
        )
