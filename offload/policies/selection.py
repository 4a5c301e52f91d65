"""Which blocks a step attends to: sink and recent always, the rest of the budget by score.

Suffixes: B sequences, G KV heads, N blocks, W wanted blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig

NEVER, ALWAYS = float("-inf"), float("inf")
Budget = int | tuple[int, ...]  # of a layer, or of each of its KV heads


@dataclass(frozen=True, slots=True)
class Selection:
    """The block arithmetic of one budget (all counts in tokens, ``reserve`` is a share of the budget).

    Up to ``whole`` tokens, the mean budget of all layers, a step attends to everything: also in a layer that has less.
    Where its KV heads have budgets of their own, ``heads``, the layer's is the largest of them: a pool has as many
    slots for each head, and shares of the budget (reserve, late fetches) are the same for all.

    ``wanted`` is pure: the same scores always give the same blocks, whoever asks and on whichever thread.
    """

    budget: int
    block_size: int
    sink: int
    recent: int
    reserve: float = 0.0
    whole: int = 0
    heads: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: OffloadConfig, budget: Budget | None = None) -> Selection:
        """The selection that a configuration asks for, in a layer with a budget of its own if one is given."""
        given = config.budget if budget is None else budget
        own, heads = (given, ()) if isinstance(given, int) else (max(given), given)
        alike = len(set(heads)) <= 1
        return cls(
            own, config.block_size, config.sink, config.recent, config.reserve, config.budget, () if alike else heads
        )

    @property
    def least(self) -> int:
        """The smallest budget of a KV head."""
        return min(self.heads, default=self.budget)

    def n_blocks(self, length: int) -> int:
        """Blocks that ``length`` tokens take, the last one perhaps partly filled."""
        return -(-length // self.block_size)

    @property
    def most_slots(self) -> int:
        """Blocks resident at most: those a step attends to, and the reserve."""
        return self.n_blocks(max(self.budget, self.whole)) + self.share(self.reserve)

    def decides(self, length: int) -> bool:
        """Whether from ``length`` tokens on the budget alone limits what a step attends to."""
        return length > self.whole or self.least >= self.whole

    def most_slots_at(self, length: int) -> int:
        """The same at ``length`` tokens: a budget below the mean takes effect with ``whole`` tokens."""
        return self.n_blocks(self.budget) + self.share(self.reserve) if self.decides(length) else self.most_slots

    def slots(self, length: int) -> int:
        """Blocks resident at ``length`` tokens."""
        return min(self.n_blocks(length), self.most_slots_at(length))

    @property
    def ahead_blocks(self) -> int:
        """Blocks beyond the budget that are fetched ahead where a step chooses among them: half the reserve.

        The other half keeps what was wanted last. Measured, that recovers nearly what fetching all of the reserve
        ahead recovers, at the traffic of fetching none.
        """
        return self.share(self.reserve) // 2

    def first_recent(self, length: int) -> int:
        """First block of the recent window: ``recent`` tokens reach into one block more unless they are aligned.

        The newest token is always recent, also where ``recent`` is 0.
        """
        return max(length - max(self.recent, 1), 0) // self.block_size

    def candidates(self, length: int) -> tuple[int, int]:
        """First and last + 1 of the blocks that are neither sink nor recent; none if the first is not below."""
        return self.sink // self.block_size, self.first_recent(length)

    def share(self, share: float) -> int:
        """Whole blocks in a share of the budget."""
        return int(share * (self.budget // self.block_size))

    def wanted(self, scores_BGN: Tensor | None, length: int, padding_B: Tensor, kv_heads: int, more: int = 0) -> Tensor:
        """Blocks that a step attends to whose own token is number ``length``, and ``more`` blocks.

        Args:
            scores_BGN: Block scores, ``-inf`` for never; may lack the newest blocks (they are recent anyway). ``None``
                wants sink and recent only.
            length: Tokens in the cache when that step attends, its own included.
            padding_B: int64, tokens of left padding of each sequence; blocks of nothing else are never wanted, and the
                sink begins at the first real token.
            kv_heads: G.
            more: Blocks beyond the budget.

        Returns:
            int64 ``[B, G, W]`` block numbers, rising in a row, then -1 where a row wants fewer than W.
        """
        n_blocks, first_block_B1 = self.n_blocks(length), (padding_B // self.block_size)[:, None]
        block_N = torch.arange(n_blocks, device=padding_B.device)
        real_BN = block_N >= first_block_B1
        limit = self.budget + more * self.block_size
        # What heads have less than the layer matters as soon as the mean budget no longer covers everything.
        less_G = less_than(self.budget, self.heads, padding_B.device) if length > self.whole else None
        everything = length <= max(limit, self.whole)
        if everything and less_G is None:
            always_BGN = real_BN[:, None]
        else:
            sink_BN = real_BN & (block_N < first_block_B1 + self.sink // self.block_size)
            always_BGN = (sink_BN | (real_BN & (block_N >= self.first_recent(length))))[:, None]
            if less_G is not None:
                always_BGN = always_BGN | (real_BN[:, None] & (length <= limit - less_G)[:, None])
        full_BGN = torch.full((len(padding_B), kv_heads, n_blocks), NEVER, device=padding_B.device)
        if scores_BGN is not None:
            known = min(scores_BGN.shape[-1], n_blocks)
            full_BGN[..., :known] = scores_BGN[..., :known]
        full_BGN.masked_fill_(~real_BN[:, None], NEVER).masked_fill_(always_BGN, ALWAYS)
        most = n_blocks if everything else limit // self.block_size
        most_G1 = None if less_G is None else ((limit - less_G) // self.block_size)[:, None]
        return _listed(best_blocks(full_BGN, most, most_G1), most)

    def within_reach(self, scores_BGN: Tensor, resident_BGN: Tensor, late_blocks: int) -> Tensor:
        """Scores with all but the best ``late_blocks`` absent blocks ruled out, so that no step fetches more."""
        if late_blocks >= scores_BGN.shape[-1]:
            return scores_BGN
        reach_BGN = best_blocks(scores_BGN.masked_fill(resident_BGN, NEVER), late_blocks)
        return scores_BGN.masked_fill(~(reach_BGN | resident_BGN), NEVER)


def best_blocks(scores_BGN: Tensor, most: int, most_G1: Tensor | None = None) -> Tensor:
    """The best ``most`` blocks of each row, as a mask; of equal ones the lowest, and none that is ``-inf``.

    ``torch.topk`` leaves it open which of equal ones it takes.

    Args:
        most_G1: For each KV head as many at most, from 1 to ``most``; ``None``: ``most`` for all.
    """
    if most == 0:
        return torch.zeros_like(scores_BGN, dtype=torch.bool)
    best_BGW = scores_BGN.topk(most, dim=-1).values
    if most_G1 is None:
        least_BG1 = best_BGW[..., -1:]
    else:
        least_BG1 = best_BGW.gather(-1, (most_G1.clamp(max=most) - 1).expand(len(scores_BGN), -1, -1))
    above_BGN, level_BGN = scores_BGN > least_BG1, (scores_BGN == least_BG1) & (scores_BGN > NEVER)
    left_BG1 = (most if most_G1 is None else most_G1) - above_BGN.sum(-1, keepdim=True)
    return above_BGN | (level_BGN & (level_BGN.cumsum(-1) <= left_BG1))


def _listed(mask_BGN: Tensor, most: int) -> Tensor:
    """Numbers of the blocks in the mask, int64 ``[B, G, most]`` in rising order, -1 behind the last."""
    block_N = torch.arange(mask_BGN.shape[-1], device=mask_BGN.device)
    # What is not in the mask writes to one column more, which is cut off.
    place_BGN = torch.where(mask_BGN, mask_BGN.cumsum(-1) - 1, most)
    listed_BGW = torch.full((*mask_BGN.shape[:2], most + 1), -1, device=mask_BGN.device)
    return listed_BGW.scatter_(-1, place_BGN, block_N.expand_as(mask_BGN))[..., :-1]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def less_than(budget: int, heads: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Tokens by which the budget of each KV head is below the layer's, int64 ``[G]``; ``None`` where all have it."""
    return torch.tensor([budget - own for own in heads], device=device) if heads else None
