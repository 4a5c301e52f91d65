"""Measures a decoding step's recovery against the true attention mass. Reads every key of the layer.

Suffixes: B sequences, G KV heads, N blocks, C block capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.offload.policies.base import Step
from attention_predictor.predictor.scores import Recovery, recovery


class Measured(NamedTuple):
    """Recovery of one step.

    Attributes:
        mass_BGC: fp32, true attention mass of each block.
        best_BGC: bool, the best blocks within the layer's budget.
        recovery: Recovery of the attended blocks, ``[B, G]``.
    """

    mass_BGC: Tensor
    best_BGC: Tensor
    recovery: Recovery


def measure(step: Step, selection: Selection) -> Measured:
    """Recovery by KV head of a step, after its attention."""
    mass_BGN = step.exact.mass_BGQN[:, :, 0]
    mass_BGC = F.pad(mass_BGN, (0, step.extent.capacity - mass_BGN.shape[-1]))
    best_BGC = chosen_blocks(selection.limits(step.length), step.extent, mass_BGC)
    return Measured(mass_BGC, best_BGC, recovery(mass_BGC, step.attended_BGC, best_BGC))
