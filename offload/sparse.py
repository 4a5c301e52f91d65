"""Attention of one new token over the blocks in the pool, in plain torch operations.

Suffixes: B sequences, G KV heads, H query heads, S slots, T tokens of a block, L tokens of the sequence, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.offload.dense import Terms, scaled_logits


class SparseAttention(NamedTuple):
    """One step's attention over the pool.

    Attributes:
        out_BHD: In the dtype of the query.
        logits_BHST: fp32, ``-inf`` where a slot or token takes no part.
        lse_BH: fp32 log-sum-exp of the logits, the sink column included.
    """

    out_BHD: Tensor
    logits_BHST: Tensor
    lse_BH: Tensor


def slot_logits(
    query_BHD: Tensor, key_BGSTD: Tensor, block_BGS: Tensor, length: int, real_BL: Tensor | None, terms: Terms
) -> Tensor:
    """Logits of the tokens of the blocks in the slots, logits_BHST in fp32; ``-inf`` where one takes no part.

    Args:
        query_BHD: The new token's queries.
        key_BGSTD: Keys in the pool.
        block_BGS: int64 block in each slot, -1 for a slot that takes no part.
        length: Tokens of the sequence, the new one included; the last block ends there.
        real_BL: bool, False at padding; ``None`` where there is none.
        terms: Scaling and softcap; its mask is not used.
    """
    B, G, S, T, D = key_BGSTD.shape
    H = query_BHD.shape[1]
    token_BGST = block_BGS[..., None] * T + torch.arange(T, device=block_BGS.device)
    takes_part = (block_BGS[..., None] >= 0) & (token_BGST < length)
    if real_BL is not None:
        index = token_BGST.clamp(0, length - 1).view(B, -1)
        takes_part &= real_BL.gather(1, index).view(B, G, S, T)
    logits = scaled_logits(query_BHD[:, :, None], key_BGSTD.view(B, G, S * T, D), terms).view(B, G, H // G, S * T)
    logits = logits.masked_fill(~takes_part.view(B, G, 1, S * T), float("-inf"))
    return logits.view(B, H, S, T)


def attend_slots(
    query_BHD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    block_BGS: Tensor,
    length: int,
    real_BL: Tensor | None,
    terms: Terms,
) -> SparseAttention:
    """Attend to the tokens of the blocks in the slots; arguments as for ``slot_logits``, and sinks in ``terms``."""
    B, G, S, T, D = key_BGSTD.shape
    H = query_BHD.shape[1]
    logits_BHST = slot_logits(query_BHD, key_BGSTD, block_BGS, length, real_BL, terms)
    logits = logits_BHST.view(B, G, H // G, S * T)
    lse_BGM = torch.logsumexp(logits, -1)
    if terms.sinks_H is not None:
        lse_BGM = torch.logaddexp(lse_BGM, terms.sinks_H.float().view(1, G, -1))
    weight = torch.exp(logits - lse_BGM[..., None])
    out_BHD = (weight @ value_BGSTD.view(B, G, S * T, D).float()).view(B, H, D)
    return SparseAttention(out_BHD.to(query_BHD.dtype), logits_BHST, lse_BGM.view(B, H))
