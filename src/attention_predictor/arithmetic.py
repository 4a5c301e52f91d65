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
    return _scatter_into(wider, index, values)


def spread(values: Tensor, index: Tensor, columns: int) -> Tensor:
    """Rows of ``columns`` zeros with ``values`` written at ``index``, as by ``scatter_or_drop``."""
    return _scatter_into(values.new_zeros((*values.shape[:-1], columns + 1)), index, values)


def _scatter_into(wider: Tensor, index: Tensor, values: Tensor | float | bool) -> Tensor:
    """``wider`` without its last column, which takes what is dropped."""
    columns = wider.shape[-1] - 1
    return wider.scatter_(-1, index % (columns + 1), values)[..., :columns]
