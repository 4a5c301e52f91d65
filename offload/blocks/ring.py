"""Ring: the last tokens of sequences in a buffer of fixed shape. It needs no lengths on the host.

Token t is at place t % P, so block n is in slot n % S, and a new block overwrites the oldest one. A ring with places
for all tokens never wraps, and is a plain buffer.

Suffixes: B sequences, G KV heads, T tokens of a block (or of what is copied), D head size, S slots, P = S·T places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div


def slots_for(window: int, block_size: int) -> int:
    """Slots that hold the last ``window`` tokens, wherever in a block they begin."""
    return ceil_div(window - 1, block_size) + 1


class RingTable:
    """The newest token's place and each slot's block, computed once a step for all rings of one shape.

    Attributes:
        place_B: int64, place of the newest token.
        block_BGS: int64, block in each slot; -1 for a slot that is still empty.
    """

    place_B: Tensor
    block_BGS: Tensor

    def __init__(self, kv_heads: int, slots: int, block_size: int, device: torch.device) -> None:
        self.kv_heads, self.block_size = kv_heads, block_size
        self.slot_S = torch.arange(slots, device=device)

    def update(self, length_B: Tensor) -> None:
        """Set the sequences' lengths, the newest token included. Uses tensor arithmetic only."""
        token_B, slots = length_B - 1, len(self.slot_S)
        self.place_B = token_B % (slots * self.block_size)
        newest_B1 = token_B[:, None] // self.block_size
        block_BS = newest_B1 - (newest_B1 - self.slot_S) % slots
        self.block_BGS = block_BS.clamp_min(-1)[:, None].expand(-1, self.kv_heads, -1).contiguous()


class Ring:
    """Keys and values of one layer.

    Args:
        key_BGTD: Gives B, G, D, dtype and device.
    """

    def __init__(self, key_BGTD: Tensor, slots: int, block_size: int) -> None:
        B, G, _, D = key_BGTD.shape
        # Zeros, because unwritten values are multiplied by a weight of 0, and 0 · NaN is NaN.
        self.key_BGSTD, self.value_BGSTD = (key_BGTD.new_zeros(B, G, slots, block_size, D) for _ in range(2))

    @property
    def places(self) -> int:
        """Number of places."""
        return self.key_BGSTD.shape[2] * self.key_BGSTD.shape[3]

    @property
    def nbytes(self) -> int:
        """Device memory."""
        return self.key_BGSTD.nbytes + self.value_BGSTD.nbytes

    def write(self, place_B: Tensor, key_BG1D: Tensor, value_BG1D: Tensor) -> None:
        """Write one token of each sequence."""
        index_BG1D = place_B[:, None, None, None].expand_as(key_BG1D)
        self.key_BGSTD.flatten(2, 3).scatter_(2, index_BG1D, key_BG1D)
        self.value_BGSTD.flatten(2, 3).scatter_(2, index_BG1D, value_BG1D)

    def fill(self, start: int, key_BGTD: Tensor, value_BGTD: Tensor, sequences: slice = slice(None)) -> None:
        """Write the tokens from number ``start`` on, at most ``places`` of them, of these sequences."""
        place_T = self._places(start, start + key_BGTD.shape[2])
        self.key_BGSTD[sequences].flatten(2, 3).index_copy_(2, place_T, key_BGTD)
        self.value_BGSTD[sequences].flatten(2, 3).index_copy_(2, place_T, value_BGTD)

    def put(self, place: int, start: int, key_1GTD: Tensor, value_1GTD: Tensor) -> None:
        """Write a sequence's tokens to a place, in which nothing of another one remains."""
        self.key_BGSTD[place].zero_()
        self.value_BGSTD[place].zero_()
        self.fill(start, key_1GTD, value_1GTD, slice(place, place + 1))

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens ``start`` to ``stop``, copied."""
        place_T = self._places(start, stop)
        key_BGPD, value_BGPD = self.key_BGSTD.flatten(2, 3), self.value_BGSTD.flatten(2, 3)
        return key_BGPD.index_select(2, place_T), value_BGPD.index_select(2, place_T)

    def _places(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.key_BGSTD.device) % self.places
