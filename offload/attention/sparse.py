"""Attention of one new token over the blocks in the pool, by a kernel or by torch operations.

Suffixes: B sequences, G KV heads, H query heads, S slots, T tokens of a block, L tokens of the sequence, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.offload.attention.dense import Terms, scaled_logits

# Length bound passed to a kernel without a padding mask; it reads the lengths themselves on the device.
MAX_TOKENS = 1 << 30


class Reach(NamedTuple):
    """Which earlier tokens the newest one may attend to.

    Attributes:
        padding_B: int64, left padding of each sequence in tokens; ``None`` if there is none.
        window: Only this many last tokens, itself included; 0: all.
        chunk: Only tokens of its own chunk; chunks of this many tokens begin after the padding. 0: all.
    """

    padding_B: Tensor | None = None
    window: int = 0
    chunk: int = 0

    def first_B(self, length_B: Tensor) -> Tensor:
        """int64, the first visible token in sequences of ``length_B`` tokens."""
        padding_B = torch.zeros_like(length_B) if self.padding_B is None else self.padding_B
        first_B = padding_B
        if self.window:
            first_B = torch.maximum(first_B, length_B - self.window)
        if self.chunk:
            in_chunk_B = (length_B - 1 - padding_B) % self.chunk
            first_B = torch.maximum(first_B, length_B - 1 - in_chunk_B)
        return first_B


WHOLE = Reach()


class SlotScores(NamedTuple):
    """A query's scores of the slots, fp32; ``-inf`` for slots that take no part.

    Attributes:
        peak_BHS: Largest logit of a slot's tokens.
        sum_BHS: Log-sum-exp of its tokens' logits.
    """

    peak_BHS: Tensor
    sum_BHS: Tensor


class SparseAttention(NamedTuple):
    """One step's attention over the pool.

    Attributes:
        out_BHD: In the dtype of the query.
        scores: The slots' scores.
        lse_BH: fp32 log-sum-exp of the logits, the sink column included.
    """

    out_BHD: Tensor
    scores: SlotScores
    lse_BH: Tensor


def why_no_kernel(key_BGSTD: Tensor) -> str | None:
    """Why no kernel supports this pool; ``None`` if one does."""
    if (reason := ops.why_no_kernels(key_BGSTD.device)) is not None:
        return reason
    T, D = key_BGSTD.shape[3:]
    return (
        None if ops.fits(key_BGSTD) else f"no kernel for {key_BGSTD.dtype}, blocks of {T} tokens and a head size of {D}"
    )


def attend_slots(
    query_BHD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor,
    block_BGS: Tensor,
    length_B: Tensor,
    real_BL: Tensor | None,
    terms: Terms,
    *,
    kernel: bool = False,
    arrived_BH: Tensor | None = None,
    reach: Reach = WHOLE,
) -> SparseAttention:
    """Attend to the tokens of the blocks in the slots.

    Args:
        query_BHD: The new token's queries.
        key_BGSTD, value_BGSTD: The pool.
        block_BGS: int64 block in each slot, -1 for a slot that takes no part.
        length_B: int64 on the device, tokens of each sequence, the new one included; the last block ends there.
        real_BL: bool, False at padding, for the whole capacity; ``None`` if there is no padding.
        terms: Scaling, softcap and sinks; its mask is not used.
        kernel: Use the kernel, which must be available (``why_no_kernel``); else the reference.
        arrived_BH: int32 zeros for the kernel; pass the same tensor to each call (``ops.sparse_decode``).
        reach: Which earlier tokens are visible.
    """
    if kernel:
        pool = (key_BGSTD, value_BGSTD, block_BGS)
        out_BHD, *scores, lse_BH = _run(query_BHD, *pool, length_B, real_BL, terms, arrived_BH, reach)
        return SparseAttention(out_BHD, SlotScores(*scores), lse_BH)
    B, G, S, T, D = key_BGSTD.shape
    H = query_BHD.shape[1]
    logits_BHST = slot_logits(query_BHD, key_BGSTD, block_BGS, length_B, real_BL, terms, reach)
    logits = logits_BHST.view(B, G, H // G, S * T)
    lse_BGM = torch.logsumexp(logits, -1)
    if terms.sinks_H is not None:
        lse_BGM = torch.logaddexp(lse_BGM, terms.sinks_H.float().view(1, G, -1))
    weight = torch.exp(logits - lse_BGM[..., None])
    out_BHD = (weight @ value_BGSTD.view(B, G, S * T, D).float()).view(B, H, D)
    return SparseAttention(out_BHD.to(query_BHD.dtype), _reduced(logits_BHST), lse_BGM.view(B, H))


def score_slots(
    query_BHD: Tensor,
    key_BGSTD: Tensor,
    block_BGS: Tensor,
    length_B: Tensor,
    real_BL: Tensor | None,
    terms: Terms,
    *,
    kernel: bool = False,
) -> SlotScores:
    """Only the scores of ``attend_slots``, with the same arguments."""
    if kernel:
        return SlotScores(*_run(query_BHD, key_BGSTD, None, block_BGS, length_B, real_BL, terms)[1:3])
    return _reduced(slot_logits(query_BHD, key_BGSTD, block_BGS, length_B, real_BL, terms))


def slot_logits(
    query_BHD: Tensor,
    key_BGSTD: Tensor,
    block_BGS: Tensor,
    length_B: Tensor,
    real_BL: Tensor | None,
    terms: Terms,
    reach: Reach = WHOLE,
) -> Tensor:
    """Logits of the slots' tokens, logits_BHST in fp32; ``-inf`` for tokens that take no part."""
    B, G, S, T, D = key_BGSTD.shape
    H = query_BHD.shape[1]
    token_BGST = block_BGS[..., None] * T + torch.arange(T, device=block_BGS.device)
    takes_part = (block_BGS[..., None] >= 0) & (token_BGST < length_B[:, None, None, None])
    if reach is not WHOLE:
        takes_part &= token_BGST >= reach.first_B(length_B)[:, None, None, None]
    if real_BL is not None:
        index = token_BGST.clamp(0, real_BL.shape[1] - 1).view(B, -1)
        takes_part &= real_BL.gather(1, index).view(B, G, S, T)
    logits = scaled_logits(query_BHD[:, :, None], key_BGSTD.view(B, G, S * T, D), terms).view(B, G, H // G, S * T)
    logits = logits.masked_fill(~takes_part.view(B, G, 1, S * T), float("-inf"))
    return logits.view(B, H, S, T)


def _reduced(logits_BHST: Tensor) -> SlotScores:
    return SlotScores(logits_BHST.amax(-1), torch.logsumexp(logits_BHST, -1))


def _run(
    query_BHD: Tensor,
    key_BGSTD: Tensor,
    value_BGSTD: Tensor | None,
    block_BGS: Tensor,
    length_B: Tensor,
    real_BL: Tensor | None,
    terms: Terms,
    arrived_BH: Tensor | None = None,
    reach: Reach = WHOLE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.sparse_decode(
        query_BHD.contiguous(),
        key_BGSTD,
        value_BGSTD,
        block_BGS.contiguous(),
        MAX_TOKENS if real_BL is None else real_BL.shape[1],
        None if real_BL is None else real_BL.contiguous(),
        None if terms.sinks_H is None else terms.sinks_H.float().contiguous(),
        terms.scaling,
        terms.softcap or 0.0,
        length_B,
        arrived_BH,
        *reach,
    )
