"""Selection: the block arithmetic of a budget, on the host. ``SlotTable`` does the choosing.

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
    from attention_predictor.offload.ranks import Ranks

NEVER, ALWAYS = float("-inf"), float("inf")
Budget = int | tuple[int, ...]  # tokens: one number for a layer, or one for each of its KV heads


class Limits(NamedTuple):
    """Bounds of one step's choice.

    Attributes:
        tokens: Most tokens to attend to. A sequence that is not longer is attended to whole.
        heads: The same for each KV head, if they differ; ``()`` if all have ``tokens``.
        sink_blocks, recent: Always attended to: this many first blocks, and last tokens (at least one).
    """

    tokens: int
    heads: tuple[int, ...]
    sink_blocks: int
    recent: int

    def always_blocks(self, block_size: int) -> int:
        """Blocks of sink and recent tokens, wherever the recent ones begin within a block."""
        return self.sink_blocks + ceil_div(max(self.recent, 1) - 1, block_size) + 1

    @property
    def deficit(self) -> tuple[int, ...]:
        """Tokens by which each KV head's limit is below ``tokens``; ``()`` if none is."""
        return tuple(self.tokens - own for own in self.heads)

    @torch.inference_mode(False)
    def deficit_BG(self, batch: int, device: torch.device) -> Tensor | None:
        """``deficit`` of every row, int64; ``None`` if all heads have the same limit."""
        return torch.tensor([self.deficit] * batch, device=device) if self.heads else None


@dataclass(frozen=True, slots=True)
class Selection:
    """The block arithmetic of one layer's budget. Counts are tokens; ``reserve`` is a share of the budget, and
    ``reserve_ahead`` one of the reserve.

    ``dense_tokens`` is the configured budget, the mean over layers. While a context is no longer than that, every layer
    attends to all of it, even one whose own budget is smaller. If KV heads have their own budgets (``heads``),
    ``budget`` is the largest of the layer and ``least`` the smallest, which may be another rank's: all heads have the
    same number of slots, reserve and late fetches, and all ranks are sparse from the same length on.
    """

    budget: int
    block_size: int
    sink: int
    recent: int
    reserve: float = 0.0
    reserve_ahead: float = 0.5
    dense_tokens: int = 0
    heads: tuple[int, ...] = ()
    least: int | None = None  # ``None``: the smallest of ``heads``

    @classmethod
    def of(cls, config: OffloadConfig, budget: Budget | None = None, ranks: Ranks | None = None) -> Selection:
        """The configured selection; ``budget`` overrides the configured budget for this layer.

        Budgets by head are those of all KV heads; of several ``ranks``, each selects for its own.
        """
        given = config.budget if budget is None else budget
        largest, heads = (given, ()) if isinstance(given, int) else (max(given), given)
        if ranks is not None:
            heads = ranks.own_heads(heads)
        alike = set(heads) <= {largest}
        return cls(
            largest,
            config.block_size,
            config.sink,
            config.recent,
            config.reserve,
            config.reserve_ahead,
            config.budget,
            () if alike else heads,
            given if isinstance(given, int) else min(given),
        )

    @property
    def min_budget(self) -> int:
        """The smallest budget of a KV head of the layer, on any rank."""
        return self.least if self.least is not None else min(self.heads, default=self.budget)

    def n_blocks(self, length: int) -> int:
        """Blocks that hold ``length`` tokens; the last one may be partly filled."""
        return ceil_div(length, self.block_size)

    @property
    def max_slots(self) -> int:
        """Most resident blocks: those a step attends to, and the reserve."""
        return self.n_blocks(max(self.budget, self.dense_tokens)) + self.share_of_budget(self.reserve)

    def is_sparse_at(self, length: int) -> bool:
        """Whether steps from ``length`` tokens on are limited by the budget, and no longer attend to everything."""
        return length > self.dense_tokens or self.min_budget >= self.dense_tokens

    def max_slots_at(self, length: int) -> int:
        """``max_slots`` at ``length`` tokens: a budget below the mean takes effect after ``dense_tokens``."""
        return (
            self.n_blocks(self.budget) + self.share_of_budget(self.reserve)
            if self.is_sparse_at(length)
            else self.max_slots
        )

    def slots(self, length: int) -> int:
        """Blocks resident at ``length`` tokens."""
        return min(self.n_blocks(length), self.max_slots_at(length))

    @property
    def ahead_blocks(self) -> int:
        """Blocks beyond the budget that are fetched ahead, for policies that choose among them: a share of the reserve.

        The rest of it keeps the blocks selected most recently. Measured for a half: nearly the recovery of fetching the
        whole reserve ahead, with the traffic of fetching none of it.
        """
        return int(self.reserve_ahead * self.share_of_budget(self.reserve))

    def first_recent(self, length: int) -> int:
        """First block of the recent window, which spans one block more if it is not aligned.

        The newest token is always recent, even if ``recent`` is 0.
        """
        return max(length - max(self.recent, 1), 0) // self.block_size

    def candidates(self, length: int) -> tuple[int, int]:
        """Range (first, end) of the blocks that are neither sink nor recent; empty if first >= end."""
        return self.sink // self.block_size, self.first_recent(length)

    def share_of_budget(self, share: float) -> int:
        """A share of the budget, in whole blocks."""
        return int(share * (self.budget // self.block_size))

    def limits(self, length: int, more: int = 0) -> Limits:
        """Bounds of a step at ``length`` tokens, with ``more`` blocks beyond the budget."""
        tokens, heads, extra = self.budget, self.heads, more * self.block_size
        if length <= self.dense_tokens:
            tokens, heads = max(tokens + extra, self.dense_tokens), ()
        else:
            tokens, heads = tokens + extra, tuple(own + extra for own in heads)
        return Limits(tokens, heads, self.sink // self.block_size, self.recent)
