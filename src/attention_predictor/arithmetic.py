"""Arithmetic that many modules share. It imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Whole = TypeVar("Whole", int, Tensor)


def ceil_div(length: Whole, size: int) -> Whole:
    """Quotient rounded up: the number of blocks of ``size`` that hold ``length`` tokens.

    Args:
        length: A whole number, or a tensor of integers, which stays on its device.
        size: At least 1.
    """
    return -(-length // size)


def scatter_or_drop(into: Tensor, index: Tensor, values: Tensor | float | bool) -> Tensor:
    """``into`` with ``values`` written at ``index`` of the last dimension; values with index -1 are dropped.

    Returns a new tensor. Dropped values go to an extra column, which is then removed.

    Args:
        index: int64, from -1 to the last column; no number but -1 twice in a row.
    """
    columns = into.shape[-1]
    wider = into.new_empty((*into.shape[:-1], columns + 1))
    wider[..., :columns] = into
    index = index % (columns + 1)
    return wider.scatter_(-1, index, values)[..., :columns]
