"""FusibleRotary: an attention module whose rotary embedding one kernel can compute.

Suffixes: B sequences, H query heads, G KV heads, T tokens, D head size, E elements of a head that are rotated.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import nn

from attention_predictor.csrc import ops
from attention_predictor.csrc.binding import ELEMENTS
from attention_predictor.offload.hf.fused.fusible import FORWARD_ERRORS, Forward, Fusible, random

ROTARY = "apply_rotary_pos_emb"  # as transformers' attention modules look it up among their globals


class FusibleRotary(Fusible):
    """An attention module whose forward calls a function that rotates each half of a head with the other.

    Args:
        function: The function it calls.
        whole, part: Whether the kernel agrees with it on whole heads, and on heads that are rotated in part.
    """

    what = "rotary embeddings"

    def __init__(self, module: nn.Module, function: Forward, whole: bool, part: bool) -> None:
        super().__init__(module)
        self._function, self._whole, self._part = function, whole, part

    @classmethod
    def find(cls, module: nn.Module, seen: dict[Any, Any]) -> FusibleRotary | None:
        function, weight = _rotary_of(type(module).forward), next(module.parameters(), None)
        if function is None or weight is None or weight.dtype not in ELEMENTS:
            return None
        if (key := (function, weight.dtype, weight.device)) not in seen:
            seen[key] = tuple(_is_the_kernel(function, weight.dtype, weight.device, part) for part in (False, True))
        whole, part = seen[key]
        return cls(module, function, whole, part) if whole or part else None

    def is_as_found(self) -> bool:
        return super().is_as_found() and _rotary_of(self.own) is self._function

    def forward(self) -> Forward:
        """A copy of the class's forward in which the function's name refers to the kernel; globals are not changed."""
        function, whole, part = self._function, self._whole, self._part

        def rotate(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 4 and not kwargs and ops.rotates(*args):
                query_BHTD, _, cosine_BTE, _ = args
                if whole if query_BHTD.shape[3] == cosine_BTE.shape[2] else part:
                    return ops.rotate(*args)
            return function(*args, **kwargs)

        copied = _with_global(self.own, ROTARY, rotate)
        assert copied is not None  # as when it was found
        return types.MethodType(copied, self.module)


def _rotary_of(forward: Forward) -> Forward | None:
    """The rotary function that a forward calls, if it can be replaced."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, types.FunctionType) or ROTARY not in inner.__code__.co_names:
        return None
    function = inner.__globals__.get(ROTARY)
    return function if callable(function) and _with_global(forward, ROTARY, function) is not None else None


def _is_the_kernel(function: Forward, dtype: torch.dtype, device: torch.device, part: bool) -> bool:
    """Whether function and kernel agree bit for bit."""
    B, H, G, T, D = 2, 4, 2, 3, 64
    E = D // 2 if part else D
    # A real embedding has equal halves of angles. These differ, to reveal the order in which they are used.
    shapes = ((B, H, T, D), (B, G, T, D), (B, T, E), (B, T, E))
    given = tuple(random(dtype, device, *shape, seed=seed) for seed, shape in enumerate(shapes))
    try:
        wanted = function(*given)
    except FORWARD_ERRORS:  # it takes other arguments, or rotates whole heads only
        return False
    if not isinstance(wanted, tuple) or [getattr(x, "dtype", None) for x in wanted] != [dtype, dtype]:
        return False
    return all(map(torch.equal, ops.rotate(*given), wanted))


def _with_global(function: Any, name: str, value: Any) -> types.FunctionType | None:
    """A copy of a function, and of the function it wraps, with one global name bound to ``value``.

    A wrapper (``functools.wraps``) keeps the wrapped function in a closure cell; ``None`` if it does not.
    """
    if not isinstance(function, types.FunctionType):
        return None
    namespace, cells = function.__globals__, function.__closure__ or ()
    if hasattr(function, "__wrapped__"):
        wrapped = function.__wrapped__
        inner = _with_global(wrapped, name, value)
        holds = [_content(cell) is wrapped for cell in cells]
        if inner is None or not any(holds):
            return None
        cells = tuple(types.CellType(inner) if held else cell for cell, held in zip(cells, holds, strict=True))
    else:
        namespace = {**namespace, name: value}
    made = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
