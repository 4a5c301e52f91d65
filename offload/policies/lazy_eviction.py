"""LazyEviction (Zhang et al., ACL 2026, arXiv 2506.15969): keys that come back are kept until they are due.

As in the paper: a key is active in a step that gives it attention of α or more; TS is its last active step, MRI the
longest interval between two of them. With t the step now, its importance is

    2σ(−(t − TS) / MRI) + 2σ(1 − MRI), and zero if it was never active:

high until more time has passed than the longest it has stayed away, and higher the more often it comes. Eviction lags:
every W tokens, and between times nothing goes. What goes never comes back.

Adapted: blocks in place of tokens; a block is active if one of its tokens is, for a query head of the KV head. The
paper keeps the last W tokens and lets the cache grow by W beyond the budget before it evicts. Here W is the engine's
recent tokens (64; the paper has 27 to 175, by model and task), and room for W tokens is made within the budget, of at
most half of what sink and recent leave. The last W queries of a prompt count as steps, so that a long one is evicted
before decoding. α = 5e-4 is the paper's for Llama (1e-4 for its other models).

Suffixes: B sequences, G KV heads, Q queries, N blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.policies.base import BlockValues, LayerSpec, Policy, ReadKeys, Step
from attention_predictor.offload.policies.selection import ALWAYS, NEVER


class LazyEviction(Policy):
    """Evicts by how overdue a block is, several blocks at a time."""

    name = "lazy-eviction"
    selects = "ahead"
    evicts = True
    alpha = 5e-4

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = max(spec.config.recent, 1)
        self.steps = 0
        self.last = BlockValues(spec)
        self.interval = BlockValues(spec)
        self.evicted = BlockValues(spec, False)
        self.gone = 0  # blocks that every row has evicted

    @property
    def parts(self) -> dict[str, BlockValues]:  # type: ignore[override]
        return {"last": self.last, "interval": self.interval, "evicted": self.evicted}

    @torch.no_grad()
    def observe_rows(self, rows: ScoreRows) -> None:
        n_blocks = rows.scores_BGQN.shape[-1]
        for peak_BGN in rows.scores_BGQN.unbind(2):
            before_BGN = self.last.grow(n_blocks, fill=self.steps)
            self.steps += 1
            self.last.value_BGN = before_BGN.masked_fill(peak_BGN >= self.alpha, self.steps)
            away_BGN = self.last.value_BGN - before_BGN
            self.interval.value_BGN = torch.maximum(self.interval.grow(n_blocks), away_BGN)

    def observe(self, step: Step) -> None:
        self.observe_rows(step.seen)

    def importance(self) -> Tensor:
        """Of each block seen, ``[B, G, N]`` from 0 to 2."""
        away_BGN, interval_BGN = self.steps - self.last.value_BGN, self.interval.value_BGN
        score_BGN = 2 * torch.sigmoid(-away_BGN / interval_BGN) + 2 * torch.sigmoid(1 - interval_BGN)
        return score_BGN.masked_fill(interval_BGN == 0, 0)

    def score_next(self, length: int) -> Tensor:
        selection = self.selection
        n_blocks = selection.n_blocks(length)
        evicted_BGN = self.evicted.grow(n_blocks)
        budget = selection.least // selection.block_size
        if length > max(selection.least, selection.whole) and n_blocks - self.gone > budget:
            evicted_BGN = self._evict(length)
        return torch.zeros_like(evicted_BGN, dtype=torch.float32).masked_fill(evicted_BGN, NEVER)

    def _evict(self, length: int) -> Tensor:
        """Make room for W tokens, those of the block that needs it now among them; evicted_BGN, all that is gone."""
        n_blocks, size = self.selection.n_blocks(length), self.selection.block_size
        first, last = self.selection.candidates(length)
        budget = self.selection.least // size
        free = budget - (first + n_blocks - last)
        keep = budget + 1 - max(min(self.selection.recent // size, free // 2), 1)
        place_N = torch.arange(n_blocks, device=self.spec.device)
        # In fp64, so that of equals the newer ones stay and nothing else changes places.
        rank_BGN = F.pad(self.importance().double(), (0, n_blocks - self.last.n_blocks)) + 1e-9 * place_N
        # A padded sequence's sink begins behind its padding.
        padding_B11 = 0 if self.padding_B is None else (self.padding_B // size)[:, None, None]
        sink_BGN = (place_N >= padding_B11) & (place_N < padding_B11 + first)
        rank_BGN = rank_BGN.masked_fill(place_N < padding_B11, NEVER).masked_fill(sink_BGN | (place_N >= last), ALWAYS)
        kept_BGK = rank_BGN.masked_fill(self.evicted.value_BGN, NEVER).topk(keep, dim=-1).indices
        lost_BGN = torch.ones_like(self.evicted.value_BGN).scatter(-1, kept_BGK, False)
        self.evicted.value_BGN = self.evicted.value_BGN | lost_BGN
        self.gone = n_blocks - keep
        return self.evicted.value_BGN

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        for values in self.parts.values():
            values.crop(self.selection.n_blocks(length))
        self.gone = int(self.evicted.value_BGN.sum(-1).min())
