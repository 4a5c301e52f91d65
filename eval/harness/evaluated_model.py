"""EvaluatedModel: generation and likelihoods of a model under one selection policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.forwards import check_positions
from attention_predictor.offload.hf.placement import input_device
from attention_predictor.offload.hf.versions import with_cache


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
        self._check_fits(len(prompt) + max_new_tokens)
        ends = _ends(self.model) + [token for token in stop if token not in _ends(self.model)]
        ids_BL = torch.tensor([list(prompt)], device=input_device(self.model))
        padding = self.model.generation_config.pad_token_id
        out_BL = self.model.generate(  # type: ignore[operator]  # mixed in by a class that mypy does not see
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=padding if padding is not None else next(iter(ends), 0),
            **({"do_sample": False} | options),
        )
        return out_BL[0, len(prompt) :].tolist()

    def predict(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], max_new_tokens: int, /, **options: Any
    ) -> dict[str, Any]:
        """``generate`` as a record: the text ``pred``, ``prompt_tokens`` and ``new_tokens``."""
        tokens = self.generate(prompt, max_new_tokens, **options)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        return {"pred": text, "prompt_tokens": len(prompt), "new_tokens": len(tokens)}

    @torch.no_grad()
    def log_likelihoods(self, prompt: Sequence[int], text: Sequence[int]) -> list[float]:
        """Natural logarithm of each text token's probability after the prompt, decoded token by token.

        The prompt is prefilled in full; every token after the first is predicted under the policy.
        """
        token_L = torch.tensor(list(text), device=input_device(self.model))
        predicted = zip(token_L, self.logits(prompt, token_L.unbind(), len(text)), strict=True)
        found = [logits_V.float().log_softmax(-1)[token] for token, logits_V in predicted]
        return torch.stack(found).tolist() if found else []

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], text: Iterable[Tensor], tokens: int) -> Iterator[Tensor]:
        """Logits ``[V]`` that predict each of ``tokens`` tokens after the prompt, decoded token by token.

        Args:
            text: The tokens themselves, on the device. Each is read after its logits have been yielded.

        Raises:
            ContextLengthError, HostMemoryError: Prompt and text don't fit; nothing was computed.
        """
        self._check_fits(len(prompt) + tokens)
        cache = self.new_cache()
        ids_1L = torch.tensor([list(prompt)], device=input_device(self.model))
        given = iter(text)
        for _ in range(tokens):
            yield self.model(ids_1L, **with_cache(self.model, cache), logits_to_keep=1).logits[0, -1]
            ids_1L = next(given).view(1, 1)

    def new_cache(self) -> Cache:
        """An empty cache: the engine's, or for the stock model an ordinary one."""
        if self.engine is not None:
            return self.engine.new_cache()
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    @property
    def ends(self) -> list[int]:
        """The token ids that end a text of this model."""
        return _ends(self.model)

    def _check_fits(self, tokens: int) -> None:
        if self.engine is None:
            check_positions(self.model.config.get_text_config(decoder=True), tokens)
        else:
            self.engine.check_fits(batch=1, tokens=tokens)


def _ends(model: PreTrainedModel) -> list[int]:
    """The token ids that end a text of this model."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]
