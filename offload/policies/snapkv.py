"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469, section 4): the end of the prompt votes for the rest of it, once.

As in the paper: the attention of the last prompt queries, summed and pooled over neighbouring tokens, ranks the
prompt's keys; the choice stays while decoding. The defaults are those of the authors' code: 32 queries, average pooling
over 5 tokens. Query heads that share a KV head vote together, by their mean (as in NVIDIA's kvpress).

Adapted: blocks in place of tokens. A block's vote is the mass of its tokens, and pooling over tokens spreads a little
of it to the blocks beside it (``pooled``). The window itself lies within the engine's recent tokens. The paper keeps
every generated token besides its budget; here the budget holds for all, so that what leaves the recent tokens takes
the place of the prompt's lowest blocks. No block of the prompt comes in again.

Suffixes: B sequences, G KV heads, Q queries, N blocks, C blocks there is room for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.policies.base import BlockValues, LayerSpec, Policy, ReadKeys, newest_first


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
        with torch.inference_mode(False):  # what is made there could not be written to outside of it
            self.prompt_blocks_1 = torch.zeros(1, dtype=torch.int64, device=spec.device)  # that were voted on

    @property
    def parts(self) -> dict[str, BlockValues]:  # type: ignore[override]
        return {"votes": self.votes}

    def indicator(self, mass_BGQN: Tensor) -> Tensor:
        """What the window's rows say of each block, ``[B, G, N]``, before pooling."""
        return mass_BGQN.mean(2)

    @torch.no_grad()
    def observe_rows(self, rows: ScoreRows) -> None:
        new_BGN = pooled(self.indicator(rows.mass_BGQN), self.kernel, self.spec.config.block_size)
        share = rows.mass_BGQN.shape[2] / self.prompt_rows if self.has_voted else 1.0
        n_blocks, self.has_voted = new_BGN.shape[-1], True
        self.prompt_blocks_1.fill_(n_blocks)
        self.votes.reserve(n_blocks)
        self.votes.value_BGC[..., :n_blocks].lerp_(new_BGN, share)

    def score_next(self, extent: Extent) -> Tensor:
        # The recent tokens touch one block more unless they are aligned: counted always, lest one come and go.
        first_recent_B = extent.next.n_blocks_B - 1 - self.spec.config.recent // extent.block_size
        first_B = torch.minimum(first_recent_B.clamp_min(0), self.prompt_blocks_1)
        return newest_first(self.votes.value_BGC, first_B[:, None], extent)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        n_blocks = self.selection.n_blocks(length)
        self.prompt_blocks_1.clamp_(max=n_blocks)
        self.votes.crop(n_blocks)


def pooled(x_BGN: Tensor, kernel: int, block_size: int) -> Tensor:
    """Block sums after average pooling over ``kernel`` tokens, each block's sum lying evenly on its tokens.

    Args:
        x_BGN: Block sums.
        kernel: Tokens; odd, and its half at most a block.
    """
    reach = kernel // 2
    # Of the token p places from a border, (reach - p) / kernel crosses it.
    across = reach * (reach + 1) / (2 * kernel * block_size)
    before_BGN, after_BGN = F.pad(x_BGN, (1, 0))[..., :-1], F.pad(x_BGN, (0, 1))[..., 1:]
    return (1 - 2 * across) * x_BGN + across * (before_BGN + after_BGN)
