"""Gradient checkpointing of an attached model: what ``backward`` computes again is stock, as the forward was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from attention_predictor.offload.hf.turns import Turns


class RecomputedAsStock:
    """In place of a module's checkpointing function: calls it so that recomputation, after the forward, is stock too.

    Attributes:
        own: The function in whose place it stands.
    """

    def __init__(self, own: Callable[..., Any], turns: Turns) -> None:
        self.own, self._turns = own, turns

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def as_stock(*args: Any, **kwargs: Any) -> Any:
            with self._turns.take(stock=True, joins=True):
                return function(*args, **kwargs)

        return self.own(as_stock, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Copies of an attached model are stock models."""
        return copy.deepcopy(self.own, memo)
