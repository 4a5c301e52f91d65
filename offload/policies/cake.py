"""CAKE (Qin et al., ICLR 2025, arXiv 2503.12491): ranks keys by mean and variance of attention; gives layers unequal
budgets.

As in the paper: a key's indicator is the mean of the attention of the last 32 prompt queries plus γ = 200 times its
variance over them, pooled over 5 tokens and averaged over the query heads of a KV head. A layer's preference is
H^(1/τ1) · V^(1/τ2), H being the entropy of that attention (how widely it is spread) and V the sum of its variances
(how much it shifts); layers share the total budget by it (``policies/allocation.py``). τ1 = τ2 = 1; the authors tune
both by model.

Adapted: blocks in place of tokens, the rest as in SnapKV; the query heads of a KV head are averaged before and not
after the variance. While decoding, the authors' code keeps evicting the keys with the least attention from the newest
query; here generated blocks replace the blocks with the lowest indicators.

Suffixes: B sequences, G KV heads, Q queries, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.offload.policies.snapkv import SnapKV


class CAKE(SnapKV):
    """Selects once, after the prompt, as SnapKV does; the indicator also keeps keys with occasional attention."""

    name = "cake"
    allocation = "cake"
    gamma = 200.0

    def indicator(self, mass_BGQN: Tensor) -> Tensor:
        return mass_BGQN.mean(2) + self.gamma * _variance(mass_BGQN)


def entropy_and_shift(mass_BGQN: Tensor) -> Tensor:
    """Entropy and shift of each KV head, ``[B, G, 2]``, from the window's rows over the blocks before it."""
    return torch.stack([torch.special.entr(mass_BGQN).sum((2, 3)), _variance(mass_BGQN).sum(2)], -1)


def preference(found_BG2: Tensor, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """A layer's preference for room, ``[B]``, from ``entropy_and_shift`` of its KV heads; of a part of them, theirs."""
    entropy_B, shift_B = found_BG2.sum(1).unbind(-1)
    return entropy_B ** (1 / tau1) * shift_B ** (1 / tau2)


def _variance(mass_BGQN: Tensor) -> Tensor:
    """Over queries, ``[B, G, N]``; of a single one, zero."""
    return mass_BGQN.var(2, correction=min(mass_BGQN.shape[2] - 1, 1))
