"""Query similarity of a head, before and after rotation, of a prompt's end and of decoded steps.

TAPPA's theory (arXiv 2601.21709) is about queries *before* RoPE, after the query norm if the model has one. A cache or
an attention function, and code that ranks layers there, sees queries *after* RoPE: two equal queries a few tokens apart
then differ in their fast channels. Both similarities are given.

Suffixes: B sequences, H query heads, T tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.offload.policies.query_similarity import query_similarity


def over_windows(query_BHTD: Tensor, window: int) -> Tensor:
    """Mean similarity of consecutive windows of so many tokens, fp32 ``[B, H]``: as of a prompt's end, further on.

    What is left of a last window counts if it is half of one or more, or if there is no other.
    """
    parts = [part for part in query_BHTD.split(window, dim=2) if 2 * part.shape[2] >= window]
    return torch.stack([query_similarity(part) for part in parts or [query_BHTD]]).mean(0)
