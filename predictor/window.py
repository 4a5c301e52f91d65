"""Predictors that keep a window of past score rows; the published network is one.

Suffixes: B sequences, G KV heads, X = B × G, R history rows (oldest first), S chosen rows among them, N
blocks, C state channels or feature maps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_predictor.predictor.base import AttentionPredictor, register

WINDOW_ROWS = 64  # H of the published method
TILE_ELEMENTS = 1 << 19  # window elements convolved at once: 32 feature maps of them take 64 MiB in fp32


class RowWindow(AttentionPredictor):
    """The state is the window of the last 64 rows, oldest first, with zero rows before a short prompt.

    fp16 halves the memory and changes no score by more than 0.05%, too little to affect the ranking.
    """

    channels = WINDOW_ROWS
    state_dtype = torch.float16

    def start(self, rows_BGRN: Tensor) -> Tensor:
        window_BGNR = rows_BGRN[:, :, -self.channels :].transpose(2, 3).to(self.state_dtype)
        return F.pad(window_BGNR, (self.channels - window_BGNR.shape[3], 0)).contiguous()

    def observe(self, state_BGNC: Tensor, row_BGN: Tensor) -> Tensor:
        state_BGNC[..., :-1] = state_BGNC[..., 1:].clone()
        state_BGNC[..., -1] = row_BGN
        return state_BGNC

    def unroll(self, rows_BGRN: Tensor, steps_S: Tensor) -> Tensor:
        padded_BGRN = F.pad(rows_BGRN, (0, 0, self.channels - 1, 0))
        return padded_BGRN.unfold(2, self.channels, 1)[:, :, steps_S].to(self.state_dtype)


@register
class WindowPredictor(RowWindow):
    """The published network (AttentionPredictor, arXiv 2502.04077, section 4), state-dict keys included.

    Evaluated as written, over the whole window at every step. Its scores are on the scale of the raw block scores.
    """

    arch = "paper"

    def __init__(self, *, block_size: int = 16):
        super().__init__(block_size=block_size)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv1d(32, 1, 1)

    def forward(self, state_BGNC: Tensor, candidate_BN: Tensor | None = None) -> Tensor:
        batch, kv_heads, n_blocks, rows = state_BGNC.shape
        window_XRN = state_BGNC.reshape(-1, n_blocks, rows).transpose(1, 2).to(self.conv1.weight.dtype)
        # Blocks beside the candidates count as zeros, like the padding of a convolution at the ends.
        mask_X11N = window_XRN.new_ones(1, 1, 1, n_blocks)
        if candidate_BN is not None:
            mask_X11N = candidate_BN.repeat_interleave(kv_heads, 0)[:, None, None].to(window_XRN.dtype)
        # Feature maps take 48 times the window, so columns are computed in tiles. Two 3-wide convolutions reach 2
        # columns to each side, so tiles with that margin give the same numbers.
        width = max(64, TILE_ELEMENTS // (rows * max(1, batch * kv_heads)))
        tiles = []
        for first in range(0, n_blocks, width):
            last, low = min(first + width, n_blocks), max(0, first - 2)
            mask = mask_X11N[..., low : min(last + 2, n_blocks)]
            tile_X1RN = window_XRN[:, None, :, low : min(last + 2, n_blocks)] * mask
            features_XCN = self.conv2(self.conv1(tile_X1RN).relu() * mask).relu().mean(dim=2)
            tiles.append(self.conv3(features_XCN)[:, 0, first - low : last - low])
        scores_XN = torch.cat(tiles, dim=1) if tiles else window_XRN.new_zeros(batch * kv_heads, 0)
        return scores_XN.view(batch, kv_heads, n_blocks).float()
