"""Handed: identifies the tensors that a cache layer returned to the model, to check them when attention is called.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attention_predictor.errors import AttachError

# Attribute of the key that a layer's `update` returns; it carries the layer to the attention function.
HANDLE = "_attention_predictor_layer"


class Handed(NamedTuple):
    """Identities of the key and value that ``update`` returned; it holds no tensor."""

    tokens: int
    key: tuple[Any, ...]
    value: tuple[Any, ...]

    def check(self, number: int, key_BGTD: Tensor, value_BGTD: Tensor, query_BHQD: Tensor) -> None:
        """Raise ``AttachError`` unless these are layer ``number``'s unchanged tensors, with one query per new token."""
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
    """A view of the key that carries ``layer`` to the attention function, and its ``Handed``.

    A new view, so that the reference from tensor to layer ends with the call. The layer must not hold the view: that
    cycle would keep the whole prefill alive.
    """
    key_BGTD = key_BGTD.view_as(key_BGTD)
    setattr(key_BGTD, HANDLE, layer)
    return key_BGTD, Handed(key_BGTD.shape[2], _identity(key_BGTD), _identity(value_BGTD))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Identifies a tensor and its version: a later write to it changes the result."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version
