"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469, section 4): the last prompt queries choose blocks once.

As in the paper: the attention of the last prompt queries, the observation window, ranks the keys before it, summed and
pooled over neighbouring tokens; the window stays, and so does the choice while decoding. The defaults are those of the
authors' code: 32 queries, average pooling over 5 tokens. Query heads that share a KV head vote together, by their mean
(as in NVIDIA's kvpress). With blocks of one token the choice is kvpress's.

Adapted: blocks in place of tokens. A block's vote is the mass of its tokens, and pooling over tokens spreads a little
of it to the blocks beside it (``pooled``). Sink and recent tokens are kept besides the window. The paper keeps every
generated token besides its budget; here the budget holds for all, so that these take the place of the prompt's lowest
blocks, and of the window's once no other is left. No block of the prompt comes in again.

Suffixes: B sequences, G KV heads, Q queries, N blocks, C block capacity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.policies.base import (
    BlockValues,
    LayerSpec,
    Part,
    Policy,
    ReadKeys,
    SequenceValues,
    newest_first,
)


class SnapKV(Policy):
    """Static votes of the prompt's last queries; further prompts and drafts of several tokens vote anew.

    Fewer queries than the window (the last chunk of a prefill) replace their share of the votes before.
    """

    name = "snapkv"
    selects = "ahead"
    prompt_rows = 32
    kernel = 5

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.votes = BlockValues(spec)
        self.has_voted = False
        self.voted = SequenceValues(spec, torch.int64)  # blocks before the window

    @property
    def parts(self) -> dict[str, Part]:
        return {"votes": self.votes, "voted": self.voted}

    def indicator(self, mass_BGQN: Tensor) -> Tensor:
        """What the window's rows say of each block, ``[B, G, N]``, before pooling."""
        return mass_BGQN.mean(2)

    @torch.no_grad()
    def observe_rows(self, rows: ScoreRows) -> None:
        queries, n_blocks = rows.mass_BGQN.shape[2:]
        size = self.spec.config.block_size
        voted = max(n_blocks - ceil_div(self.prompt_rows, size), 0)
        sides = self.indicator(rows.mass_BGQN).tensor_split([voted], -1)  # what the window has is not pooled with more
        new_BGN = torch.cat([pooled(side_BGN, self.kernel, size) for side_BGN in sides], -1)
        share = queries / self.prompt_rows if self.has_voted else 1.0
        self.has_voted = True
        self.voted.value_B.fill_(voted)
        self.votes.reserve(n_blocks)
        self.votes.value_BGC[..., :n_blocks].lerp_(new_BGN, share)

    def score_next(self, extent: Extent) -> Tensor:
        # The recent tokens touch one block more unless they are aligned: counted always, lest one come and go.
        first_recent_B = extent.next.n_blocks_B - 1 - self.spec.config.recent // extent.block_size
        first_B = torch.minimum(first_recent_B.clamp_min(0), self.voted.value_B)
        return newest_first(self.votes.value_BGC, first_B[:, None], extent)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        n_blocks = self.selection.n_blocks(length)
        self.voted.value_B.clamp_(max=n_blocks)
        self.votes.crop(n_blocks)


def pooled(x_BGN: Tensor, kernel: int, block_size: int) -> Tensor:
    """Block sums after average pooling over ``kernel`` tokens, each block's sum lying evenly on its tokens.

    Args:
        x_BGN: Block sums.
        kernel: Tokens; odd.
    """
    N, reach = x_BGN.shape[-1], kernel // 2
    away = ceil_div(reach, block_size)  # blocks
    wider_BGN, pooled_BGN = F.pad(x_BGN, (away, away)), torch.zeros_like(x_BGN)
    for blocks in range(-away, away + 1):
        apart = (blocks * block_size + shift for shift in range(-reach, reach + 1))
        pairs = sum(max(block_size - abs(tokens), 0) for tokens in apart)  # of a token and one that it is pooled with
        pooled_BGN += pairs / (kernel * block_size) * wider_BGN[..., away + blocks : away + blocks + N]
    return pooled_BGN
