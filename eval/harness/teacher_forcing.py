"""Teacher forcing: decodes known tails token by token after one prefill, as a batch.

Suffixes: B tails, L steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from attention_predictor.offload.hf.placement import input_device
from attention_predictor.offload.hf.versions import with_cache


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, prompt: Sequence[int], sequences: int) -> None:
    """Prefill a prompt once, then repeat the cache for ``sequences`` sequences."""
    model(torch.tensor([list(prompt)], device=input_device(model)), **with_cache(model, cache), logits_to_keep=1)
    cache.batch_repeat_interleave(sequences)


@torch.no_grad()
def decode_tails(model: PreTrainedModel, cache: Cache, tails: Sequence[Sequence[int]]) -> Tensor:
    """Decode the tails token by token, one for each sequence of a prefilled cache.

    Args:
        tails: Token ids, all of one length.

    Returns:
        int64 ``[B, L]``, the most likely token after each token of a tail.
    """
    tails_BL = torch.tensor([list(tail) for tail in tails], device=input_device(model))
    best = [
        model(token_B1, **with_cache(model, cache)).logits[:, -1].argmax(-1) for token_B1 in tails_BL.split(1, dim=1)
    ]
    return torch.stack(best, 1)
