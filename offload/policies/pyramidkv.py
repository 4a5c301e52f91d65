"""PyramidKV (Cai et al., 2024, arXiv 2406.02069, section 4): SnapKV with larger budgets in lower layers.

As in the paper: budgets fall by the same step from layer to layer, the top layer having 1/β of the mean, β = 20;
within a layer the last 8 prompt queries (as in the authors' scripts) rank the keys as SnapKV's do.

Adapted: what falls is the budget beyond sink, recent and one block, which every layer has, rounded to blocks; the total
is exactly that of equal budgets (``offload/policies/allocation.py``). The rest as in SnapKV.
"""

from __future__ import annotations

from attention_predictor.offload.policies.snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV's votes; a budget that falls with the layer's number."""

    name = "pyramidkv"
    prompt_rows = 8
    allocation = "pyramid"
