"""Attention over all keys, one chunk at a time: what prefill, later turns and every reference need.

Keys and values come as an iterator of chunks, so that a cache in host memory passes through the device without ever
being there as a whole; chunks are merged by log-sum-exp (Milakov and Gimelshein 2018, "Online normalizer calculation
for softmax").

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens of a chunk, D head size, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.predictor.scores import block_peak_and_sum

# Logits of one chunk take at most this much device memory (fp32), and a chunk has at most this many tokens.
CHUNK_BYTES = 1 << 27
CHUNK_TOKENS = 4096


class Chunk(NamedTuple):
    """Keys and values of tokens ``start`` to ``start + T``."""

    start: int
    key_BGTD: Tensor
    value_BGTD: Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """How logits are made from queries and keys, and which keys a query may see.

    Attributes:
        scaling: Factor on q·k.
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), or ``None``.
        sinks_H: Logit of one more softmax column without a value for each head (GPT-OSS), or ``None``.
        mask: ``None`` (causal), bool ``[B, length]`` (causal, and True where the key is no padding), or
            ``[B, 1 or H, Q, length]``, bool (True where allowed) or additive.
    """

    scaling: float
    softcap: float | None = None
    sinks_H: Tensor | None = None
    mask: Tensor | None = None

    def last_queries(self, count: int) -> Terms:
        """The same terms for the last ``count`` queries alone."""
        if self.mask is None or self.mask.dim() == 2:
            return self
        return Terms(self.scaling, self.softcap, self.sinks_H, self.mask[:, :, -count:])


class ScoreRows(NamedTuple):
    """Softmax probabilities of some queries, pooled by block (see ``predictor/scores.py``)."""

    scores_BGQN: Tensor
    mass_BGQN: Tensor


def split(key_BGTD: Tensor, value_BGTD: Tensor, chunk: int) -> Iterator[Chunk]:
    """Chunks of keys and values that are on the device already."""
    for start in range(0, key_BGTD.shape[2], chunk):
        yield Chunk(start, key_BGTD[:, :, start : start + chunk], value_BGTD[:, :, start : start + chunk])


def chunk_tokens(query_BHQD: Tensor, block_size: int) -> int:
    """Tokens a chunk may have, a multiple of the block size, within ``CHUNK_BYTES`` and ``CHUNK_TOKENS``."""
    heads_and_queries = query_BHQD.shape[0] * query_BHQD.shape[1] * query_BHQD.shape[2]
    tokens = min(CHUNK_BYTES // (4 * heads_and_queries), CHUNK_TOKENS)
    return max(tokens // block_size, 1) * block_size


def scaled_logits(query_BHQD: Tensor, key_BGTD: Tensor, terms: Terms) -> Tensor:
    """fp32 ``[B, H, Q, T]`` logits before any mask; the query heads of a KV head share its keys unrepeated."""
    B, H, Q, D = query_BHQD.shape
    grouped = query_BHQD.float().reshape(B, key_BGTD.shape[1], -1, D)
    logits_BHQT = (grouped @ key_BGTD.float().transpose(-1, -2)).view(B, H, Q, -1) * terms.scaling
    if terms.softcap is not None:
        logits_BHQT = terms.softcap * torch.tanh(logits_BHQT / terms.softcap)
    return logits_BHQT


def attend_prompt(query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
    """Attention of a prompt over itself: torch's fused attention where it can do it, ``attend`` where not."""
    B, H, Q, _ = query_BHQD.shape
    length, mask = key_BGTD.shape[2], terms.mask
    too_large = mask is not None and mask.dim() == 2 and B * Q * length > CHUNK_BYTES
    if terms.softcap is not None or terms.sinks_H is not None or too_large:
        return attend(query_BHQD, split(key_BGTD, value_BGTD, chunk_tokens(query_BHQD, 1)), length, terms)
    if mask is not None and mask.dim() == 2:
        causal_QL = torch.ones(Q, length, dtype=torch.bool, device=mask.device).tril(length - Q)
        mask = causal_QL & mask[:, None, None]
    groups = H // key_BGTD.shape[1]
    if mask is not None and groups > 1:  # with a mask, fused kernels on CUDA want the heads repeated
        key_BGTD, value_BGTD = key_BGTD.repeat_interleave(groups, 1), value_BGTD.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(
        query_BHQD,
        key_BGTD,
        value_BGTD,
        attn_mask=mask,
        is_causal=mask is None and Q > 1,
        scale=terms.scaling,
        enable_gqa=mask is None and groups > 1,
    )


def attend(query_BHQD: Tensor, chunks: Iterable[Chunk], length: int, terms: Terms) -> Tensor:
    """Softmax attention of the last Q of ``length`` tokens over all keys.

    Returns:
        ``[B, H, Q, D]`` in the dtype of the query; a query that may see no key gives zeros.
    """
    B, H, Q, D = query_BHQD.shape
    if terms.sinks_H is None:
        peak_BHQ1 = query_BHQD.new_full((B, H, Q, 1), float("-inf"), dtype=torch.float32)
        total_BHQ1 = torch.zeros_like(peak_BHQ1)
    else:  # the sink is a column that has been merged already, with a value of zero
        peak_BHQ1 = terms.sinks_H.float().view(1, H, 1, 1).expand(B, H, Q, 1)
        total_BHQ1 = torch.ones_like(peak_BHQ1)
    out_BHQD = query_BHQD.new_zeros((B, H, Q, D), dtype=torch.float32)
    for chunk in chunks:
        logits_BHQT = _masked(scaled_logits(query_BHQD, chunk.key_BGTD, terms), chunk.start, length, terms.mask)
        new_peak_BHQ1 = torch.maximum(peak_BHQ1, logits_BHQT.amax(-1, keepdim=True))
        # A row without any key so far has a peak of -inf; 0 stands in, so that exp gives 0 and not nan.
        base_BHQ1 = new_peak_BHQ1.masked_fill(new_peak_BHQ1 == float("-inf"), 0.0)
        weight_BHQT = torch.exp(logits_BHQT - base_BHQ1)
        decay_BHQ1 = torch.exp(peak_BHQ1 - base_BHQ1)
        grouped = weight_BHQT.reshape(B, chunk.value_BGTD.shape[1], -1, weight_BHQT.shape[-1])
        out_BHQD = out_BHQD * decay_BHQ1 + (grouped @ chunk.value_BGTD.float()).view(B, H, Q, D)
        total_BHQ1 = total_BHQ1 * decay_BHQ1 + weight_BHQT.sum(-1, keepdim=True)
        peak_BHQ1 = new_peak_BHQ1
    return (out_BHQD / total_BHQ1.clamp_min(torch.finfo(torch.float32).tiny)).to(query_BHQD.dtype)


def score_rows(
    query_BHQD: Tensor, chunks: Iterable[Chunk], length: int, terms: Terms, *, kv_heads: int, block_size: int
) -> ScoreRows:
    """True block scores and block mass of the last Q queries, in one pass over the keys.

    Chunks must start at block borders. No matrix of queries by keys is ever whole: each chunk leaves one maximum and
    one log-sum-exp a block.
    """
    peaks, sums = [], []
    for chunk in chunks:
        logits_BHQT = _masked(scaled_logits(query_BHQD, chunk.key_BGTD, terms), chunk.start, length, terms.mask)
        peak_BHQN, sum_BHQN = block_peak_and_sum(logits_BHQT, block_size)
        peaks.append(peak_BHQN)
        sums.append(sum_BHQN)
    peak_BHQN, sum_BHQN = torch.cat(peaks, -1), torch.cat(sums, -1)
    total_BHQ1 = torch.logsumexp(sum_BHQN, -1, keepdim=True)
    if terms.sinks_H is not None:
        total_BHQ1 = torch.logaddexp(total_BHQ1, terms.sinks_H.float().view(1, -1, 1, 1))
    total_BHQ1 = total_BHQ1.masked_fill(total_BHQ1 == float("-inf"), 0.0)
    scores_BHQN, mass_BHQN = torch.exp(peak_BHQN - total_BHQ1), torch.exp(sum_BHQN - total_BHQ1)
    B, H, Q, N = scores_BHQN.shape
    grouped = (B, kv_heads, H // kv_heads, Q, N)
    return ScoreRows(scores_BHQN.view(grouped).amax(2), mass_BHQN.view(grouped).mean(2))


def _masked(logits_BHQT: Tensor, start: int, length: int, mask: Tensor | None) -> Tensor:
    """Rule out the keys that a query may not see, ``start`` being the number of the chunk's first token."""
    Q, T = logits_BHQT.shape[-2:]
    if mask is not None and mask.dim() == 4:
        part = mask[..., start : start + T]
        return logits_BHQT.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits_BHQT + part
    if start + T > length - Q + 1:  # some query comes before some key of this chunk
        query_Q1 = torch.arange(length - Q, length, device=logits_BHQT.device)[:, None]
        key_T = torch.arange(start, start + T, device=logits_BHQT.device)
        logits_BHQT = logits_BHQT.masked_fill(key_T > query_Q1, float("-inf"))
    if mask is not None:
        logits_BHQT = logits_BHQT.masked_fill(~mask[:, None, None, start : start + T], float("-inf"))
    return logits_BHQT
