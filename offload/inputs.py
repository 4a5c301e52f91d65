"""Inputs of generation, as callers give them: token ids, counts and end tokens are checked before any work.

Suffixes: B sequences, T tokens, ``x`` any dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from attention_predictor.errors import ConfigError
from attention_predictor.kinds import Kind, whole
from attention_predictor.offload.runtime import Runtime

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COUNT = whole(1)


def check(name: str, value: object, kind: Kind, *, or_none: bool = False) -> None:
    """``ConfigError`` unless the value is of a kind, or ``None`` if that is allowed."""
    if or_none and value is None:
        return
    if not isinstance(value, bool):
        with suppress(TypeError):  # NumPy's integers and tensors of one count
            value = operator.index(value)  # type: ignore[arg-type]
    if (expected := kind.expected(value)) is not None:
        raise ConfigError(f"{name}={value!r} is not allowed: expected {expected}{', or None' if or_none else ''}")


def ids_of_one(ids: Tensor | Sequence[int], what: str) -> Tensor:
    """The token ids of one sequence; ``ConfigError`` unless they are at least one integer, in one dimension."""
    try:
        if isinstance(ids, str):
            raise TypeError
        ids_T = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(
            f"input_ids of a {what} must be [tokens] with at least one token, got {shorten(repr(ids), 60)}"
        ) from None
    if ids_T.dim() != 1 or len(ids_T) == 0:
        found = list(ids_T.shape) if isinstance(ids, Tensor) else shorten(repr(ids), 60)
        raise ConfigError(f"input_ids of a {what} must be [tokens] with at least one token, got {found}")
    check_integers(ids_T, f"input_ids of a {what}")
    return ids_T.clone()  # the caller may use the same memory for another prompt


def check_integers(ids_x: Tensor, name: str) -> None:
    """``ConfigError`` unless these are whole numbers of up to 64 bits, in a dense tensor."""
    _check_dense(ids_x, name)
    if ids_x.dtype not in INTEGERS:
        raise ConfigError(f"{name} must be whole numbers, got {ids_x.dtype}")


def _check_dense(x: Tensor, name: str) -> None:
    if x.layout != torch.strided or x.is_meta:
        kind = "a meta tensor" if x.is_meta else x.layout
        raise ConfigError(f"{name} must be a dense tensor with values, got {kind}")


def check_vocabulary(runtime: Runtime, ids_x: Tensor) -> None:
    """``ConfigError`` for what is no token of the model. Waits for the device that holds the ids."""
    vocabulary = runtime.text_config.vocab_size
    least, most = (int(end) for end in ids_x.aminmax())
    if least < 0 or most >= vocabulary:
        found = least if least < 0 else most
        raise ConfigError(f"token {found} in input_ids: the model has tokens from 0 to {vocabulary - 1}")


def check_batch(runtime: Runtime, ids_BT: Tensor, attention_mask: object) -> None:
    """``ConfigError`` for a batch of prompts, or its mask, that is not allowed."""
    if ids_BT.dim() != 2 or 0 in ids_BT.shape:
        raise ConfigError(f"input_ids must be [batch, tokens] with at least one token, got {list(ids_BT.shape)}")
    check_integers(ids_BT, "input_ids")
    check_vocabulary(runtime, ids_BT)
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise ConfigError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != ids_BT.shape:
        raise ConfigError(f"attention_mask is {list(attention_mask.shape)}, input_ids {list(ids_BT.shape)}")
    _check_dense(attention_mask, "attention_mask")
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ConfigError("attention_mask must be 1 for each token and 0 for each of padding, found other values")


def token_list(token_ids: object, name: str = "eos_token_id") -> list[int]:
    """One token, several or none, as a list; ``ConfigError`` for anything else. Tensors and NumPy's integers count."""
    if token_ids is None:
        return []
    given: Any = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
    several = list(given) if isinstance(given, Iterable) else [given]
    try:
        found = [operator.index(one) for one in several]
    except TypeError:
        found = []
    if len(found) < len(several) or any(one.bit_length() > 63 for one in found):
        raise ConfigError(f"{name}={token_ids!r} is not allowed: expected a token id, several, or None")
    return found
