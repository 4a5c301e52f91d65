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

from attention_predictor.offload.generation import next_logits
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.forwards import check_positions
from attention_predictor.offload.inputs import COUNT, check, check_vocabulary, ids_of_one
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
    ids_T = ids_of_one(input_ids, "prefix")
    check("prefill_chunk_size", chunk, COUNT, or_none=True)
    check_vocabulary(runtime, ids_T)
    check_positions(runtime.text_config, len(ids_T))
    runtime.room.check(batch=1, tokens=len(ids_T), room=0)
    cache = TieredCache(runtime)
    for part_T in ids_T.to(device=runtime.device, dtype=torch.int64).split(chunk or len(ids_T)):
        next_logits(model, cache, part_T[None])
    return Prefix(ids_T.cpu(), runtime, cache)
