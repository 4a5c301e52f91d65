"""LazyEviction (Zhang et al., ACL 2026, arXiv 2506.15969): keys that come back are kept until they are due.

As in the paper: a key is active in a step that gives it attention of α or more; TS is its last active step, MRI the
longest interval between two of them. With t the step now, its importance is

    2σ(−(t − TS) / MRI) + 2σ(1 − MRI), and less than any other if it was never active:

high until more time has passed than the longest it has stayed away, and higher the more often it comes. Eviction lags:
every W tokens, and between times nothing goes. What goes never comes back.

Adapted: blocks in place of tokens; a block is active if one of its tokens is, for a query head of the KV head. The
paper keeps the last W tokens and lets the cache grow by W beyond the budget before it evicts. Here W is the engine's
recent tokens (64; the paper has 27 to 175, by model and task), and room for W tokens is made within the budget, of at
most half of what sink and recent leave: a budget is what the device holds at most, so a step attends to W tokens less
than it at times, where the paper's attends to up to W more. The last W queries of a prompt count as steps, so that a
long one is evicted before decoding. α = 5e-4 is the paper's for Llama (1e-4 for its other models).

Suffixes: B sequences, G KV heads, Q queries, N blocks, C block capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import NEVER
from attention_predictor.offload.policies.base import (
    BlockValues,
    LayerSpec,
    Part,
    Policy,
    ReadKeys,
    SequenceValues,
    Step,
)

NOT_YET = torch.finfo(torch.float32).max  # TS of a block that no step has seen: later than any step


class LazyEviction(Policy):
    """Evicts by how overdue a block is, several blocks at a time: it leaves part of the budget unspent where a row is
    full. What a step does not attend to is evicted."""

    name = "lazy-eviction"
    selects = "ahead"
    evicts = True
    alpha = 5e-4

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = max(spec.config.recent, 1)
        self.steps = SequenceValues(spec, torch.float32)  # so far, TS counts them
        self.last = BlockValues(spec, NOT_YET)
        self.interval = BlockValues(spec)
        self.evicted = BlockValues(spec, False)

    @property
    def parts(self) -> dict[str, Part]:
        return {"last": self.last, "interval": self.interval, "evicted": self.evicted, "steps": self.steps}

    @property
    def _steps_B11(self) -> Tensor:
        return self.steps.value_B[:, None, None]

    def rebudget(self) -> None:
        selection, size = self.selection, self.selection.block_size
        recent_blocks, self.blocks_G = selection.recent // size, self.budget_G // size
        free_G = self.blocks_G - selection.sink // size - recent_blocks - 1  # recent tokens may touch one block more
        # Blocks of W tokens. One of them is the newest block, for which room is made anyway.
        lag_G = (free_G // 2).clamp(1, max(recent_blocks, 1))
        self.unspent_G = (lag_G - 1) * size
        self.whole_G = self.budget_G.clamp_min(selection.dense_tokens)

    @torch.no_grad()
    def observe_rows(self, rows: ScoreRows) -> None:
        n_blocks = rows.scores_BGQN.shape[-1]
        self.last.reserve(n_blocks)
        self.interval.reserve(n_blocks)
        for score_BGN in rows.scores_BGQN.unbind(2):
            self._observe(score_BGN, self._steps_B11)

    def observe(self, step: Step) -> None:
        self._observe(step.score_BGC, torch.where(step.extent.begun_BC[:, None], self._steps_B11, NOT_YET))
        self.evicted.value_BGC.copy_(step.left_out_BGC)  # after a crop, recent blocks are held again

    def _observe(self, score_BGN: Tensor, first_BGN: Tensor) -> None:
        """One step's scores of the first N blocks; ``first_BGN``: TS of those that no step has seen before."""
        last_BGN, interval_BGN = (part.value_BGC[..., : score_BGN.shape[-1]] for part in (self.last, self.interval))
        before_BGN = torch.minimum(last_BGN, first_BGN)
        self.steps.value_B += 1
        last_BGN.copy_(torch.where(score_BGN >= self.alpha, self._steps_B11, before_BGN))
        torch.maximum(interval_BGN, last_BGN - before_BGN, out=interval_BGN)

    def importance(self) -> Tensor:
        """Of each block, ``[B, G, C]``: from 0 to 2; below 0, the newest highest, if it was never active."""
        interval_BGC = self.interval.value_BGC
        overdue_BGC = (self._steps_B11 - self.last.value_BGC) / interval_BGC
        score_BGC = 2 * (torch.sigmoid(-overdue_BGC) + torch.sigmoid(1 - interval_BGC))
        age_C = torch.arange(-interval_BGC.shape[-1], 0, device=interval_BGC.device)
        return torch.where(interval_BGC > 0, score_BGC, age_C)

    def score_next(self, extent: Extent) -> Tensor:
        return self.importance().masked_fill(self.evicted.value_BGC, NEVER)

    def unspent(self, extent: Extent) -> Tensor:
        held_BG = (extent.next.real_BC[:, None] > self.evicted.value_BGC).sum(-1)
        is_full_BG = (held_BG > self.blocks_G) & (extent.next.length_B[:, None] > self.whole_G)
        return is_full_BG * self.unspent_G

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        for values in (self.last, self.interval, self.evicted):
            values.crop(self.selection.n_blocks(length))
