"""What a row of history is: one step's attention, pooled to blocks of tokens.

Suffixes: B sequences, G KV heads, H query heads, Q queries, N blocks, T tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_MASS = 1e-12  # below it there is nothing to recover


class Recovery(NamedTuple):
    """How much of the true attention mass a choice of blocks holds.

    Attributes:
        share: Of all mass; fp32, without the dimension of blocks.
        relative: Its ratio to that of the best choice.
    """

    share: Tensor
    relative: Tensor


def recovery(mass_N: Tensor, chosen_N: Tensor, best_N: Tensor) -> Recovery:
    """Recovery of the chosen blocks, and relative to the best ones: bool masks ``[..., N]`` as the mass."""
    got, most = (mass_N.masked_fill(~mask_N, 0).sum(-1) for mask_N in (chosen_N, best_N))
    total = mass_N.sum(-1)  # below 1 where an attention sink takes its share
    return Recovery(got / total.clamp_min(MIN_MASS), got / most.clamp_min(MIN_MASS))


def block_scores(prob_BHQT: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """What a predictor reads: each block's largest probability, over its tokens and its group's heads.

    Pooling over tokens is AttentionPredictor's (arXiv 2502.04077, section 4); pooling over the query heads
    that share a KV head is ours: those heads fetch the same block, so one of them wanting it is enough.

    `prob_BHQT` holds softmax probabilities, query heads of one KV head side by side. T may end inside a
    block. Returns scores_BGQN in [0, 1], of the same dtype.
    """
    return _blocks(prob_BHQT, kv_heads, block_size).amax(dim=(2, 5))


def block_mass(prob_BHQT: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """Attention mass of each block: its probability sum, averaged over the group's heads.

    Recovery is measured in it and predictors are trained towards it; over all blocks it sums to 1.
    Returns mass_BGQN in [0, 1], of the same dtype.
    """
    return _blocks(prob_BHQT, kv_heads, block_size).sum(dim=5).mean(dim=2)


def _blocks(prob_BHQT: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """View as [B, G, heads of a group, Q, N, block_size]; the last block is filled up with zeros."""
    if prob_BHQT.dim() != 4:
        raise ValueError(f"prob_BHQT must have 4 dimensions [B, H, Q, T], got shape {tuple(prob_BHQT.shape)}")
    batch, heads, queries, tokens = prob_BHQT.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {heads} query heads of prob_BHQT, got {kv_heads}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}")
    missing = -tokens % block_size
    padded_BHQT = F.pad(prob_BHQT, (0, missing)) if missing else prob_BHQT
    n_blocks = (tokens + missing) // block_size
    return padded_BHQT.reshape(batch, kv_heads, heads // kv_heads, queries, n_blocks, block_size)


def block_peak_and_sum(logits_HT: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Maximum and log-sum-exp of the logits ``[..., T]`` over each block, ``[..., N]``; a partial block is allowed."""
    short = -logits_HT.shape[-1] % block_size
    padded = F.pad(logits_HT, (0, short), value=float("-inf")) if short else logits_HT
    blocks = padded.unflatten(-1, (-1, block_size))
    return blocks.amax(-1), torch.logsumexp(blocks, -1)
