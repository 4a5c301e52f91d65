"""PyramidKV (Cai et al., 2024, arXiv 2406.02069, section 4): SnapKV with more room in lower layers than in upper ones.

As in the paper: budgets fall by the same step from layer to layer, the top layer having 1/β of the mean, β = 20;
within a layer the last 8 prompt queries (as in the authors' scripts) rank the keys as SnapKV's do.

Adapted: what falls is the budget beyond sink, recent and one block, which every layer has, rounded to blocks; the total
is exactly that of equal budgets. The rest as in SnapKV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention_predictor.offload.policies.base import share_budget
from attention_predictor.offload.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig


class PyramidKV(SnapKV):
    """SnapKV's votes; a budget that falls with the layer's number."""

    name = "pyramidkv"
    prompt_rows = 8
    beta = 20

    @classmethod
    def budget(cls, config: OffloadConfig, layer: int, n_layers: int) -> int:
        top, bottom = 1 / cls.beta, 2 - 1 / cls.beta
        fall = (bottom - top) / max(n_layers - 1, 1)
        return share_budget(config, [bottom - number * fall for number in range(n_layers)])[layer]
