"""Full attention: every block, streamed through from host memory at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention_predictor.offload.policies.base import Policy

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig


class Full(Policy):
    """Attends to everything: exact, and as slow as the bus. The yardstick for quality."""

    name = "full"
    selects = "all"

    @classmethod
    def why_never_captured(cls, config: OffloadConfig) -> str | None:
        return f"policy {cls.name!r} reads every key at every step"
