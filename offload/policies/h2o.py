"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048, section 4): what had most attention so far, and what is newest.

As in the paper: a key's score is the attention it has had from all queries since it came; half of the budget goes to
the newest tokens, the rest to the highest scores; what is left out once never comes back.

Adapted: blocks in place of tokens, with the mass of their tokens; KV heads in place of query heads, with the mean of
those that share one; the engine's sink is kept whatever its score. Of a prompt only the last 1,024 queries count (of
each chunk, if its prefill is chunked): the rows of all queries would take more time and memory than a long prefill.

Suffixes: B sequences, G KV heads, N blocks, C block capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import NEVER
from attention_predictor.offload.policies.base import BlockValues, LayerSpec, Policy, ReadKeys, Step, newest_first


class H2O(Policy):
    """The newest blocks and those with the most attention so far, of all that were never left out.

    What one step does not attend to is evicted. A later turn or drafts of several tokens attend to everything, as
    with every policy; single tokens behind them again only to what was kept.
    """

    name = "h2o"
    selects = "ahead"
    evicts = True
    prompt_rows = 1024

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.attention = BlockValues(spec)
        self.evicted = BlockValues(spec, False)

    @property
    def parts(self) -> dict[str, BlockValues]:  # type: ignore[override]
        return {"attention": self.attention, "evicted": self.evicted}

    @torch.no_grad()
    def observe_rows(self, rows: ScoreRows) -> None:
        mass_BGN = rows.mass_BGQN.sum(2)
        self.attention.reserve(mass_BGN.shape[-1])
        self.attention.value_BGC[..., : mass_BGN.shape[-1]] += mass_BGN

    def observe(self, step: Step) -> None:
        self.attention.value_BGC += step.mass_BGC
        self.evicted.value_BGC.copy_(step.left_out_BGC)  # after a crop, recent blocks are held again

    def score_next(self, extent: Extent) -> Tensor:
        newest_G = self.budget_G // 2
        first_BG = (extent.next.length_B[:, None] - newest_G).clamp_min(0) // extent.block_size
        scores_BGC = newest_first(self.attention.value_BGC, first_BG, extent)
        return scores_BGC.masked_fill(self.evicted.value_BGC, NEVER)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        for values in self.parts.values():
            values.crop(self.selection.n_blocks(length))
