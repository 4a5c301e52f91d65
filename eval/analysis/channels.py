"""Which RoPE channels separate the keys a head attends to from other keys.

A logit is the sum of q·k over channel pairs. The attention-weighted mean over keys minus the plain mean, computed for
each pair, shows which frequencies separate attended keys from the others. Fast pairs encode distances of a few tokens;
slow pairs, and channels that don't turn, encode the content of a key independent of its position (TAPPA, arXiv
2601.21709).

Suffixes: B sequences, G KV heads, H query heads, Q steps, T tokens of a chunk, D head size, P pairs of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.eval.analysis.patterns import Part
from attention_predictor.eval.analysis.rope import Rotation


class ChannelSums:
    """Sums over the keys of one layer, chunk by chunk, within the classified part of each head's map."""

    def __init__(self, part: Part, kv_heads: int, head_dim: int) -> None:
        B, H, Q, _ = part.mass_BHQN.shape
        self.part, self.kv_heads = part, kv_heads
        self.weighted_BHQD = part.mass_BHQN.new_zeros(B, H, Q, head_dim)
        self.far_BGD = part.mass_BHQN.new_zeros(B, kv_heads, head_dim)
        self.all_BGD = torch.zeros_like(self.far_BGD)
        self.tokens = 0

    def add(self, start: int, key_BGTD: Tensor, prob_BHQT: Tensor) -> None:
        """The keys from token ``start`` on, and their probabilities as ``Part.cut`` leaves them."""
        key_BGTD = key_BGTD.float()
        grouped_BGRT = prob_BHQT.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        self.weighted_BHQD += (grouped_BGRT @ key_BGTD).view(self.weighted_BHQD.shape)
        first, end = (max(token - start, 0) for token in self._far_tokens)
        self.far_BGD += key_BGTD[:, :, first:end].sum(2)
        self.all_BGD += key_BGTD.sum(2)
        self.tokens += key_BGTD.shape[2]

    def by_pair(self, query_BHQD: Tensor, scaling: float, rotation: Rotation) -> Tensor:
        """In logits, ``[B, H, P + 1]``: each pair's part, then that of all channels that don't turn.

        Before a softcap, where a model has one.
        """
        first, end = self._far_tokens
        group = query_BHQD.shape[1] // self.kv_heads
        usual = (self.far_BGD / max(end - first, 1), self.all_BGD / max(self.tokens, 1))
        far_BHD, all_BHD = (mean_BGD.repeat_interleave(group, 1) for mean_BGD in usual)
        usual_BHD = far_BHD.where(self.part.far_BH[..., None], all_BHD)
        mass_BHQ1 = self.part.mass_BHQN.sum(-1, keepdim=True)
        above_BHQD = self.weighted_BHQD - mass_BHQ1 * usual_BHD[:, :, None]
        product_BHD = (query_BHQD.float() * scaling * above_BHQD).sum(2) / mass_BHQ1.sum(2).clamp_min(1e-12)
        return rotation.by_pair(product_BHD)

    @property
    def _far_tokens(self) -> tuple[int, int]:
        return self.part.first_token, int(self.part.end_Q[-1])
