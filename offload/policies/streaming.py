"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453, section 3): the attention sink and the newest tokens.

As in the paper: the first tokens stay, and the newest fill the rest of the budget. Nothing that left comes back, and
new tokens are written where they are read, so that decoding fetches nothing.

Adapted: blocks in place of tokens; the sink is the engine's (64 tokens, where the paper has 4). Keys keep the positions
they were computed for, where the paper numbers them by their place in the cache.

Suffixes: B sequences, G KV heads, C block capacity.
"""

from __future__ import annotations

from torch import Tensor

from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.policies.base import Policy


class Streaming(Policy):
    """The newest blocks first; the sink is kept for every policy."""

    name = "streaming"
    selects = "ahead"

    def score_next(self, extent: Extent) -> Tensor:
        return extent.block_C.float().expand(len(extent.length_B), self.spec.kv_heads, -1)
