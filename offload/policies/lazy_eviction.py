"""LazyEviction (Zhang et al., ACL 2026, arXiv 2506.15969): keys that come back are kept until they are due.

As in the paper: a key is active in a step that gives it attention of α or more; TS is its last active step, MRI the
longest interval between two of them. With t the step now, its importance is

    2σ(−(t − TS) / MRI) + 2σ(1 − MRI), and zero if it was never active:

high until more time has passed than the longest it has stayed away, and higher the more often it comes. Eviction lags:
every W tokens, and between times nothing goes. What goes never comes back.

Adapted: blocks in place of tokens; a block is active if one of its tokens is, for a query head of the KV head. The
paper keeps the last W tokens and lets the cache grow by W beyond the budget before it evicts. Here W is the engine's
recent tokens (64; the paper has 27 to 175, by model and task), and room for W tokens is made within the budget, of at
most half of what sink and recent leave: a budget is what the device holds at most, so a step attends to W tokens less
than it at times, where the paper's attends to up to W more. The last W queries of a prompt count as steps, so that a
long one is evicted before decoding. α = 5e-4 is the paper's for Llama (1e-4 for its other models).

Suffixes: B sequences, G KV heads, Q queries, N blocks, C block capacity, K blocks kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import ALWAYS, NEVER
from attention_predictor.offload.policies.base import BlockValues, LayerSpec, Policy, ReadKeys, Step

UNSEEN = -1.0  # TS of a block that no step has seen


class LazyEviction(Policy):
    """Evicts by how overdue a block is, several blocks at a time."""

    name = "lazy-eviction"
    selects = "ahead"
    evicts = True
    alpha = 5e-4

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = max(spec.config.recent, 1)
        with torch.inference_mode(False):
            self.steps_1 = torch.zeros(1, device=spec.device)  # so far, TS counts them
        self.last = BlockValues(spec, UNSEEN)
        self.interval = BlockValues(spec)
        self.evicted = BlockValues(spec, False)

    @property
    def parts(self) -> dict[str, BlockValues]:  # type: ignore[override]
        return {"last": self.last, "interval": self.interval, "evicted": self.evicted}

    @torch.no_grad()
    def observe_rows(self, rows: ScoreRows) -> None:
        n_blocks = rows.scores_BGQN.shape[-1]
        self.last.reserve(n_blocks)
        self.interval.reserve(n_blocks)
        for peak_BGN in rows.scores_BGQN.unbind(2):
            self._observe(peak_BGN, torch.ones_like(peak_BGN, dtype=torch.bool))

    def observe(self, step: Step) -> None:
        self._observe(step.seen.scores_BGQN[:, :, 0], step.extent.begun_BC[:, None])

    def _observe(self, peak_BGN: Tensor, begun_BGN: Tensor) -> None:
        """One step's largest shares of the first N blocks, of which some have begun."""
        last_BGN, interval_BGN = (part.value_BGC[..., : peak_BGN.shape[-1]] for part in (self.last, self.interval))
        before_BGN = torch.where((last_BGN == UNSEEN) & begun_BGN, self.steps_1, last_BGN)
        self.steps_1 += 1
        last_BGN.copy_(torch.where((peak_BGN >= self.alpha) & begun_BGN, self.steps_1, before_BGN))
        interval_BGN.copy_(torch.maximum(interval_BGN, last_BGN - before_BGN))

    def importance(self) -> Tensor:
        """Of each block, ``[B, G, C]`` from 0 to 2."""
        away_BGC, interval_BGC = self.steps_1 - self.last.value_BGC, self.interval.value_BGC
        score_BGC = 2 * torch.sigmoid(-away_BGC / interval_BGC) + 2 * torch.sigmoid(1 - interval_BGC)
        return score_BGC.masked_fill(interval_BGC == 0, 0)

    def score_next(self, extent: Extent) -> Tensor:
        self._evict(extent.next)
        evicted_BGC = self.evicted.value_BGC
        return torch.zeros_like(evicted_BGC, dtype=torch.float32).masked_fill_(evicted_BGC, NEVER)

    def _evict(self, extent: Extent) -> None:
        """Where a row would hold more than its budget, make room for W tokens, those of the newest block among them."""
        selection, size, block_C = self.selection, extent.block_size, extent.block_C
        blocks_G, sink_blocks = self.budget_G // size, selection.sink // size
        first_B1, length_B1 = extent.first_block_B[:, None], extent.length_B[:, None]
        real_BC = extent.begun_BC & (block_C >= first_B1)
        held_BG = (real_BC[:, None] & ~self.evicted.value_BGC).sum(-1)
        due_BG = (held_BG > blocks_G) & (length_B1 > self.budget_G.clamp_min(selection.dense_tokens))
        recent_B1 = extent.first_recent_B(selection.recent)[:, None]
        free_BG = blocks_G - (sink_blocks + extent.n_blocks_B[:, None] - recent_B1)
        keep_BG = blocks_G + 1 - (free_BG // 2).clamp(max=selection.recent // size).clamp_min(1)
        # In fp64, so that of equals the newer ones stay and nothing else changes places.
        rank_BGC = self.importance().double() + 1e-9 * block_C
        # A padded sequence's sink begins behind its padding.
        always_BC = (block_C < first_B1 + sink_blocks) | (block_C >= recent_B1)
        rank_BGC = rank_BGC.masked_fill(always_BC[:, None], ALWAYS)
        rank_BGC = rank_BGC.masked_fill(self.evicted.value_BGC | ~real_BC[:, None], NEVER)
        best_BGK = rank_BGC.topk(min(selection.budget // size, extent.capacity), dim=-1).values
        kth_BG1 = (keep_BG.clamp(max=best_BGK.shape[-1]) - 1)[..., None]
        lost_BGC = real_BC[:, None] & (rank_BGC < best_BGK.gather(-1, kth_BG1))
        self.evicted.value_BGC |= lost_BGC & due_BG[..., None]

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        for values in self.parts.values():
            values.crop(self.selection.n_blocks(length))
