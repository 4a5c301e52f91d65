"""Full attention: every block, streamed through from host memory at every step."""

from __future__ import annotations

from attention_predictor.offload.policies.base import Policy


class Full(Policy):
    """Attends to everything: exact, and as slow as the bus. The yardstick for quality."""

    name = "full"
    selects = "all"
