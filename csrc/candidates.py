"""The next step's candidate blocks, as an argument of the kernels that score them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention_predictor.csrc.binding import address, check
from attention_predictor.csrc.layout import integers, pointers


class Candidates(ctypes.Structure):
    """As in candidates.cuh."""

    _fields_ = [*pointers("length padding"), *integers("first recent block_size")]


def checked(
    first: int, recent: int, block_size: int, length_B: Tensor, padding_B: Tensor | None, like_BG: Tensor
) -> Candidates:
    """The kernels' struct; ValueError for invalid arguments.

    Args:
        first: First candidate, counted in blocks from the first one that is not all padding.
        recent: Last tokens of the next step's sequence (at least one) whose blocks are no candidates.
        block_size: Tokens of a block.
        length_B: int64, tokens of each sequence, this step's included.
        padding_B: int64, left padding in tokens; ``None``: no padding.
        like_BG: Any tensor of the batch, on the device.
    """
    for name, tensor in (("length_B", length_B), ("padding_B", padding_B)):
        if tensor is not None:
            check(name, tensor, (len(like_BG),), torch.int64, like_BG.device)
    if first < 0 or block_size < 1:
        raise ValueError(f"first is {first} and block_size {block_size}, expected at least 0 and 1")
    return Candidates(address(length_B), address(padding_B), first, recent, block_size)
