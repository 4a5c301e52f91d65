"""StreamingLLM (Xiao et al., ICLR 2024): the attention sink and the recent window, nothing else."""

from __future__ import annotations

from attention_predictor.offload.policies.base import Policy


class Streaming(Policy):
    """Never wishes for a block; sink and recent are kept for every policy anyway."""

    name = "streaming"
    selects = "ahead"
