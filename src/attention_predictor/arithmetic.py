"""Arithmetic on whole numbers that many modules share; importing it imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Whole = TypeVar("Whole", int, Tensor)


def ceil_div(length: Whole, size: int) -> Whole:
    """Quotient rounded up: how many blocks of ``size`` hold ``length`` tokens, the last of them perhaps in part.

    Args:
        length: A whole number, or a tensor of integers, which stays on its device.
        size: At least 1.
    """
    return -(-length // size)
