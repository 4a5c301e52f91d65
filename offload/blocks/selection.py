"""Selection: the block arithmetic of a budget, on the host; what is chosen by it is ``SlotTable``'s.

Suffixes: G KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig

NEVER, ALWAYS = float("-inf"), float("inf")
Budget = int | tuple[int, ...]  # of a layer, or of each of its KV heads


class Limits(NamedTuple):
    """What bounds the choice of a step's blocks; plain numbers, but for what differs by KV head.

    Attributes:
        tokens: Attended to at most; up to so many all are.
        heads: Tokens of each KV head, where they differ; ``()`` where all have ``tokens``.
        sink_blocks, recent: Always attended to: first blocks, and last tokens, one at least.
    """

    tokens: int
    heads: tuple[int, ...]
    sink_blocks: int
    recent: int

    @property
    def less(self) -> tuple[int, ...]:
        """Tokens by which each KV head has less; ``()`` where none has."""
        return tuple(self.tokens - own for own in self.heads)

    @torch.inference_mode(False)
    def less_G(self, device: torch.device) -> Tensor | None:
        """The same as a tensor, int64; ``None`` where none has less."""
        return torch.tensor(self.less, device=device) if self.heads else None


@dataclass(frozen=True, slots=True)
class Selection:
    """The block arithmetic of one budget (all counts in tokens, ``reserve`` is a share of the budget).

    Up to ``whole`` tokens, the mean budget of all layers, a step attends to everything: also in a layer that has less.
    Where its KV heads have budgets of their own, ``heads``, the layer's is the largest of them: a pool has as many
    slots for each head, and shares of the budget (reserve, late fetches) are the same for all.
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
        return ceil_div(length, self.block_size)

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

    def limits(self, length: int, more: int = 0) -> Limits:
        """What bounds the choice of a step at ``length`` tokens, and of ``more`` blocks."""
        tokens, heads, extra = self.budget, self.heads, more * self.block_size
        if length <= self.whole:
            tokens, heads = max(tokens + extra, self.whole), ()
        else:
            tokens, heads = tokens + extra, tuple(own + extra for own in heads)
        return Limits(tokens, heads, self.sink // self.block_size, self.recent)
