"""Extent: the lengths of a cache's sequences, as tensors on the device.

Suffixes: B sequences, C block capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div


@dataclass(frozen=True)
class Extent:
    """Lengths of sequences. The host knows only the capacity, so the same operations serve every length within it.

    Attributes:
        length_B: int64 on the compute device, tokens of each sequence, the newest included.
        padding_B: int64, left padding of each sequence in tokens; ``None`` if there is none.
        capacity: C, blocks that tensors have places for.
        block_size: Tokens of a block.
    """

    length_B: Tensor
    padding_B: Tensor | None
    capacity: int
    block_size: int

    @cached_property
    def block_C(self) -> Tensor:
        """Numbers of the blocks."""
        return torch.arange(self.capacity, device=self.length_B.device)

    @cached_property
    def n_blocks_B(self) -> Tensor:
        """Blocks that hold at least one token."""
        return ceil_div(self.length_B, self.block_size)

    @cached_property
    def first_block_B(self) -> Tensor:
        """First block that is not all padding."""
        return torch.zeros_like(self.length_B) if self.padding_B is None else self.padding_B // self.block_size

    def first_recent_B(self, tokens: int) -> Tensor:
        """The block where the last ``tokens`` tokens begin, at least the newest one."""
        return (self.length_B - max(tokens, 1)).clamp_min(0) // self.block_size

    @cached_property
    def begun_BC(self) -> Tensor:
        """bool, True for blocks that hold at least one token."""
        return self.block_C < self.n_blocks_B[:, None]

    @cached_property
    def real_BC(self) -> Tensor:
        """bool, True for blocks that hold at least one token that is no padding."""
        return (
            self.begun_BC if self.padding_B is None else self.begun_BC & (self.block_C >= self.first_block_B[:, None])
        )

    @cached_property
    def next(self) -> Extent:
        """The extent after one more token."""
        return Extent(self.length_B + 1, self.padding_B, self.capacity, self.block_size)
