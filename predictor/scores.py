"""Block scores and block mass, computed from attention probabilities; and recovery.

Suffixes: B sequences, G KV heads, H query heads, Q queries, N blocks, T tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_MASS = 1e-12  # avoids division by zero


class Recovery(NamedTuple):
    """The true attention mass on the chosen blocks.

    Attributes:
        share: As a share of all mass; fp32, shape ``[...]``.
        relative: Ratio of ``share`` to that of the best choice.
    """

    share: Tensor
    relative: Tensor


def recovery(mass_N: Tensor, chosen_N: Tensor, best_N: Tensor) -> Recovery:
    """Recovery of the chosen blocks. ``chosen_N`` and ``best_N`` are bool masks of the mass's shape ``[..., N]``."""
    got, best = (mass_N.masked_fill(~mask_N, 0).sum(-1) for mask_N in (chosen_N, best_N))
    total = mass_N.sum(-1)  # below 1 if the model has sink logits
    return Recovery(got / total.clamp_min(MIN_MASS), got / best.clamp_min(MIN_MASS))


def block_scores(prob_BHQT: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """Score rows: each block's largest probability over its tokens and over the query heads of its KV head.

    The maximum over tokens is AttentionPredictor's (arXiv 2502.04077, section 4). The maximum over query heads is ours:
    they fetch the same blocks, so it is enough that one of them needs a block.

    `prob_BHQT` holds softmax probabilities; query heads of one KV head are adjacent. T may end inside a block. Returns
    scores_BGQN in [0, 1], of the same dtype.
    """
    return _blocks(prob_BHQT, kv_heads, block_size).amax(dim=(2, 5))


def block_mass(prob_BHQT: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """Attention mass of each block: the sum of its probabilities, averaged over the query heads of its KV head.

    Used for recovery and as the training target; it sums to 1 over all blocks. Returns mass_BGQN in [0, 1], of the same
    dtype.
    """
    return _blocks(prob_BHQT, kv_heads, block_size).sum(dim=5).mean(dim=2)


def _blocks(prob_BHQT: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """View as [B, G, query heads of a KV head, Q, N, block_size]; the last block is padded with zeros."""
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
