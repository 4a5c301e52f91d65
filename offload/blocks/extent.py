"""Extent: how far the sequences of a cache have come, as values on the device.

Suffixes: B sequences, C blocks there is room for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div


@dataclass(frozen=True)
class Extent:
    """Lengths of sequences, of which the host knows the room alone: the same operations serve every length within it.

    Attributes:
        length_B: int64 on the compute device, tokens of each sequence, the newest included.
        padding_B: int64, tokens of left padding of each; ``None`` where there is none.
        capacity: C, blocks that there is room for.
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
        """First block that is not padding alone."""
        return torch.zeros_like(self.length_B) if self.padding_B is None else self.padding_B // self.block_size

    def first_recent_B(self, tokens: int) -> Tensor:
        """The block in which the last ``tokens`` begin; the newest token is always one of them."""
        return (self.length_B - max(tokens, 1)).clamp_min(0) // self.block_size

    @cached_property
    def begun_BC(self) -> Tensor:
        """bool, True for blocks that hold a token."""
        return self.block_C < self.n_blocks_B[:, None]

    @cached_property
    def next(self) -> Extent:
        """The same one token later."""
        return Extent(self.length_B + 1, self.padding_B, self.capacity, self.block_size)
