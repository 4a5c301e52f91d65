"""Oracle: the blocks with the largest true scores, from all keys at every step. An upper bound, for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from attention_predictor.offload.policies.base import Policy, Step

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig


class Oracle(Policy):
    """Ranks blocks by the attention mass they are about to receive; reads every key at every step to know it."""

    name = "oracle"
    selects = "now"

    @classmethod
    def why_never_captured(cls, config: OffloadConfig) -> str | None:
        return f"policy {cls.name!r} reads every key at every step"

    def score_now(self, step: Step) -> Tensor:
        mass_BGN = step.exact.mass_BGQN[:, :, 0]
        return F.pad(mass_BGN, (0, step.extent.capacity - mass_BGN.shape[-1]))
