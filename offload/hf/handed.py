"""Handed: what a cache layer has handed to the model, to be recognised when attention is asked for.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attention_predictor.errors import AttachError

# The key that a layer's `update` returns carries the layer under this name to the attention function.
HANDLE = "_attention_predictor_layer"


class Handed(NamedTuple):
    """What ``update`` has handed to the model; none of the tensors."""

    tokens: int
    key: tuple[Any, ...]
    value: tuple[Any, ...]

    def check(self, number: int, key_BGTD: Tensor, value_BGTD: Tensor, query_BHQD: Tensor) -> None:
        """Raise ``AttachError`` unless layer ``number`` is asked to attend with these tensors, for those tokens."""
        for what, found, handed in (("keys", key_BGTD, self.key), ("values", value_BGTD, self.value)):
            if _identity(found) != handed:
                raise AttachError(
                    f"layer {number}: the model changes {what} between its cache and attention: not supported"
                )
        if query_BHQD.shape[2] != self.tokens:
            raise AttachError(
                f"layer {number}: {query_BHQD.shape[2]} queries for {self.tokens} new tokens: not supported"
            )


def hand_over(layer: object, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Handed]:
    """The key as the model is to have it, leading to ``layer``, and by what it is recognised.

    It is a view of its own, so that no reference from the tensor to the layer outlives the call. The layer must never
    hold the tensor in turn: that cycle would keep the whole prefill alive.
    """
    key_BGTD = key_BGTD.view_as(key_BGTD)
    setattr(key_BGTD, HANDLE, layer)
    return key_BGTD, Handed(key_BGTD.shape[2], _identity(key_BGTD), _identity(value_BGTD))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from others, and from itself once it has been written to."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version
