"""Puts one sequence's state in place of another's, in tensors whose addresses must stay: captured steps hold them."""

from __future__ import annotations

from torch import Tensor


def put_sequence(into: Tensor, place: int, given: Tensor, spare: float = 0) -> None:
    """Overwrite sequence ``place`` of ``into`` with the only sequence of ``given``. Sequences are the first dimension.

    The two may differ in one other dimension, a capacity. What ``given`` does not fill becomes ``spare``; what it has
    beyond the capacity of ``into`` must be spare.
    """
    target, source = into[place], given[0]
    differing = [dim for dim in range(target.dim()) if target.shape[dim] != source.shape[dim]]
    if not differing:
        target.copy_(source)
        return
    (dim,) = differing
    filled = min(target.shape[dim], source.shape[dim])
    target.narrow(dim, 0, filled).copy_(source.narrow(dim, 0, filled))
    target.narrow(dim, filled, target.shape[dim] - filled).fill_(spare)
