"""The best selection there is: true top-k, from the truth itself. For evaluation."""

from __future__ import annotations

from torch import Tensor

from attention_predictor.offload.policies.base import Policy, Step


class Oracle(Policy):
    """Ranks blocks by the attention mass they are about to receive; reads every key at every step to know it."""

    name = "oracle"
    selects = "now"

    def score_now(self, step: Step) -> Tensor:
        return step.exact.mass_BGQN[:, :, 0]
