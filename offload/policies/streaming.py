"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453, section 3): the attention sink and the recent window.

The paper has 4 sink tokens and fills the rest of its cache with the newest ones. Here both are settings that hold for
every policy; ``recent = budget - sink - block_size`` makes the window as large as the budget. Keys keep the positions
that they were computed for, where the paper numbers them by their place in the cache.
"""

from __future__ import annotations

from attention_predictor.offload.policies.base import Policy


class Streaming(Policy):
    """Never wishes for a block; sink and recent are kept for every policy anyway."""

    name = "streaming"
    selects = "ahead"
