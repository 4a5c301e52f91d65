"""Prefix: the beginning that several prompts have in common, read once.

Suffixes: T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.errors import ConfigError
from attention_predictor.offload.generation import check_chunk, next_logits
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.forwards import check_positions
from attention_predictor.offload.runtime import Runtime


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that requests begin with, and what the model computed of them; see ``Engine.prefill``.

    Attributes:
        ids_T: The tokens, int64 on the CPU.
        runtime: Of the engine that read them.
    """

    ids_T: Tensor
    runtime: Runtime
    _cache: TieredCache

    @property
    def shared_tokens(self) -> int:
        """Tokens in complete slabs of host memory, which all requests that begin so have in common."""
        slab_tokens = self.runtime.room.slab_tokens
        return len(self.ids_T) // slab_tokens * slab_tokens

    def copy(self) -> TieredCache:
        """A cache that holds these tokens. Raises HostMemoryError."""
        return copy.deepcopy(self._cache)


@torch.no_grad()
def read_prefix(
    model: PreTrainedModel, runtime: Runtime, input_ids: Tensor | Sequence[int], chunk: int | None
) -> Prefix:
    """Prefill tokens, ``chunk`` at a time; as ``Engine.prefill``."""
    check_shape(input_ids, "prefix")
    ids_T = torch.as_tensor(input_ids)
    check_chunk(chunk)
    check_tokens(runtime, ids_T, "prefix")
    check_positions(runtime.text_config, len(ids_T))
    runtime.room.check(batch=1, tokens=len(ids_T), room=0)
    cache = TieredCache(runtime)
    for part_T in ids_T.to(device=runtime.device, dtype=torch.int64).split(chunk or len(ids_T)):
        next_logits(model, cache, part_T[None])
    return Prefix(ids_T.cpu(), runtime, cache)


def check_shape(ids: Tensor | Sequence[int], what: str) -> None:
    """Raise ``ConfigError`` unless these are the token ids of one sequence, at least one."""
    if (ids.dim() != 1 if isinstance(ids, Tensor) else isinstance(ids, str)) or len(ids) == 0:
        found = list(ids.shape) if isinstance(ids, Tensor) else repr(ids)
        raise ConfigError(f"input_ids of a {what} must be [tokens] with at least one token, got {found}")


def check_tokens(runtime: Runtime, ids_T: Tensor, what: str) -> None:
    """Raise ``ConfigError`` for what is no token of the model."""
    if ids_T.is_floating_point() or ids_T.dtype == torch.bool:
        raise ConfigError(f"input_ids of a {what} must be whole numbers, got {ids_T.dtype}")
    vocabulary = runtime.text_config.vocab_size
    least, most = (int(end) for end in ids_T.aminmax())
    if least < 0 or most >= vocabulary:
        found = least if least < 0 else most
        raise ConfigError(f"token {found} in input_ids: the model has tokens from 0 to {vocabulary - 1}")
