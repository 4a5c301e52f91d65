"""EvaluatedModel: generation and likelihoods of a model under one selection policy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from attention_predictor.errors import HostMemoryError
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.forwards import cached_length, check_positions
from attention_predictor.offload.hf.placement import input_device
from attention_predictor.offload.hf.versions import makes_own_cache, with_cache


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and the engine it is attached to; ``None`` for the stock model with its whole cache."""

    model: PreTrainedModel
    engine: Engine | None

    @property
    def context(self) -> int | None:
        """Tokens the model has positions for."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, *, stop: Sequence[int] = (), **options: Any
    ) -> list[int]:
        """Greedily decoded token ids after a prompt.

        Args:
            stop: Token ids that end it, besides those of the model.
            options: For ``model.generate``, such as ``min_new_tokens``, or ``do_sample=True`` and a temperature.

        Raises:
            ContextLengthError, HostMemoryError: Prompt and new tokens don't fit; nothing was computed.
        """
        self._check_fits(len(prompt), max_new_tokens)
        return self._generate(prompt, max_new_tokens, stop, options)[0, len(prompt) :].tolist()

    def predict(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        max_new_tokens: int,
        /,
        *,
        judge: Sequence[int] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """``generate`` as a record: the text ``pred``, ``prompt_tokens`` and ``new_tokens``.

        Args:
            judge: Token ids of another text behind the prompt, such as the reference answer; then the record has
                ``answer_log_likelihood``, the sum of its ``log_likelihoods``, and ``answer_tokens`` too.
        """
        judged: dict[str, Any] = {}
        if judge:
            tokens, likelihoods = self._generate_and_judge(prompt, max_new_tokens, judge, **options)
            judged = {"answer_log_likelihood": sum(likelihoods), "answer_tokens": len(likelihoods)}
        else:
            tokens = self.generate(prompt, max_new_tokens, **options)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return {"pred": text, "prompt_tokens": len(prompt), "new_tokens": len(tokens)} | judged

    @torch.no_grad()
    def log_likelihoods(self, prompt: Sequence[int], text: Sequence[int]) -> list[float]:
        """Natural logarithm of each text token's probability after the prompt, decoded token by token.

        The prompt is prefilled in full; every token after the first is predicted under the policy.
        """
        token_L = torch.tensor(list(text), device=input_device(self.model))
        return _log_likelihoods(token_L, self.logits(prompt, token_L.unbind(), len(text)))

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], text: Iterable[Tensor], tokens: int) -> Iterator[Tensor]:
        """Logits ``[V]`` that predict each of ``tokens`` tokens after the prompt, decoded token by token.

        Args:
            text: The tokens themselves, on the device. Each is read after its logits have been yielded.

        Raises:
            ContextLengthError, HostMemoryError: Prompt and text don't fit; nothing was computed.
        """
        self._check_fits(len(prompt), tokens)
        cache = self.new_cache()
        ids_1L = torch.tensor([list(prompt)], device=input_device(self.model))
        if tokens:
            logits_V = self._forward(ids_1L, cache)
            yield logits_V
            del logits_V
            yield from self._logits_behind(cache, iter(text), tokens - 1)

    def _logits_behind(self, cache: Cache, text: Iterator[Tensor], tokens: int) -> Iterator[Tensor]:
        """Logits ``[V]`` of each of ``tokens`` tokens, each behind the next one of the text."""
        for _ in range(tokens):
            yield self._forward(next(text).view(1, 1), cache)

    def _forward(self, ids_1L: Tensor, cache: Cache) -> Tensor:
        return self.model(ids_1L, **with_cache(self.model, cache), logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def _generate_and_judge(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        text: Sequence[int],
        *,
        stop: Sequence[int] = (),
        **options: Any,
    ) -> tuple[list[int], list[float]]:
        """``generate``, and ``log_likelihoods`` of a text; the prompt is prefilled once if memory holds two caches."""
        self._check_fits(len(prompt), max(max_new_tokens, len(text)))
        if makes_own_cache(self.model) or getattr(self.model.generation_config, "cache_implementation", None):
            return self.generate(prompt, max_new_tokens, stop=stop, **options), self.log_likelihoods(prompt, text)
        cache = self.new_cache()
        after_prompt = _CopyAfterPrompt(cache)
        options |= {"logits_processor": [after_prompt], "return_dict_in_generate": True, "output_logits": True}
        out = self._generate(prompt, max_new_tokens, stop, options | with_cache(self.model, cache))
        tokens, first_V = out.sequences[0, len(prompt) :].tolist(), out.logits[0][0]
        del out, cache
        if (kept := after_prompt.kept) is None:
            return tokens, self.log_likelihoods(prompt, text)
        token_L = torch.tensor(list(text), device=input_device(self.model))
        logits = chain([first_V], self._logits_behind(kept, iter(token_L), len(text) - 1))
        return tokens, _log_likelihoods(token_L, logits)

    def _generate(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int], options: dict[str, Any]
    ) -> Any:
        ends = _ends(self.model) + [token for token in stop if token not in _ends(self.model)]
        ids_BL = torch.tensor([list(prompt)], device=input_device(self.model))
        padding = self.model.generation_config.pad_token_id
        return self.model.generate(  # type: ignore[operator]  # mixed in by a class that mypy does not see
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=padding if padding is not None else next(iter(ends), 0),
            **({"do_sample": False} | options),
        )

    def new_cache(self) -> Cache:
        """An empty cache: the engine's, or for the stock model an ordinary one."""
        if self.engine is not None:
            return self.engine.new_cache()
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    @property
    def ends(self) -> list[int]:
        """The token ids that end a text of this model."""
        return _ends(self.model)

    def _check_fits(self, prompt: int, new: int) -> None:
        tokens = cached_length(prompt, new)
        if self.engine is None:
            check_positions(self.model.config.get_text_config(decoder=True), tokens)
        else:
            self.engine.check_fits(batch=1, tokens=tokens)


class _CopyAfterPrompt(LogitsProcessor):
    """Copies the cache of a ``generate`` when it holds the prompt and nothing else; changes no logits.

    Attributes:
        kept: The copy; ``None`` if there was no memory for it.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache: Cache | None = cache
        self.kept: Cache | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # named as transformers calls it
        if self.cache is not None:
            with suppress(HostMemoryError, torch.OutOfMemoryError):
                self.kept = copy.deepcopy(self.cache)
            self.cache = None
        return scores


def _log_likelihoods(token_L: Tensor, predicted: Iterable[Tensor]) -> list[float]:
    """Natural logarithm of each token's probability, given the logits ``[V]`` that predict it."""
    found = [logits_V.float().log_softmax(-1)[token] for token, logits_V in zip(token_L, predicted, strict=True)]
    return torch.stack(found).tolist() if found else []


def _ends(model: PreTrainedModel) -> list[int]:
    """The token ids that end a text of this model."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
