"""Watched layers: transformers' own cache layers, which also note what the model's mask lets the newest token see.

In captured steps a ``FixedLayer`` takes such a layer's place. It reads no mask: a token sees what the layer's ``Reach``
says. But a model may give the layer another mask: dilated, random, with a bias. So the masks of forwards that are not
captured are compared with the reach first. A mask that differs only at lengths that none of them had is not found.

Suffixes: B sequences, H heads, or 1 for all, Q queries, T keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attention_predictor.offload.attention.sparse import Reach
from attention_predictor.offload.hf.handed import hand_over

Layer = TypeVar("Layer")

HIDDEN, VISIBLE, BIASED = 0, 1, 2


class Sight(NamedTuple):
    """What the newest token saw of the last ``tokens`` ones.

    Attributes:
        state_BHT: int8; ``None``: all of them.
        padded: Whether the caller's padding, which each step is checked for, hid some of them.
    """

    tokens: int
    state_BHT: Tensor | None
    padded: bool

    def differs(self, reach: Reach, length: int, device: torch.device) -> Tensor:
        """bool without dimensions, on the device: whether ``reach`` lets the newest of ``length`` see others."""
        padding_B = torch.zeros(1, dtype=torch.int64) if self.padded or reach.padding_B is None else reach.padding_B
        padding_B = padding_B.to(device)
        first_B = reach._replace(padding_B=padding_B).first_B(torch.full_like(padding_B, length))
        token_T = torch.arange(length - self.tokens, length, device=device)
        visible_B1T = (token_T >= first_B[:, None])[:, None]
        seen_BHT = torch.ones_like(visible_B1T) if self.state_BHT is None else self.state_BHT
        missing = (first_B < length - self.tokens).any()
        return missing | (seen_BHT != visible_B1T).any()


class WatchedLayer(DynamicLayer):
    """A layer of transformers that a model keeps when it is attached; ``watch`` makes one of a stock layer.

    Attributes:
        sights: Of the forward in progress; several if layers share keys.
    """

    sights: tuple[Sight, ...] = ()
    _differs: Tensor | bool | None = None

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.sights = ()
        key_states, value_states = super().update(key_states, value_states, *args, **kwargs)
        return hand_over(self, key_states, value_states)[0], value_states

    def see(self, query_BHQD: Tensor, key_BGTD: Tensor, mask: Tensor | None) -> None:
        """Note what the last query may see: of prompts and later turns, and of a step if there was neither.

        ``mask``: as in ``Terms``.
        """
        if query_BHQD.shape[2] == 1 and self._differs is not None:
            return
        padded = mask is not None and mask.dim() == 2
        state_BHT = None if mask is None or padded else _states(mask[:, :, -1])
        self.sights += (Sight(key_BGTD.shape[2], state_BHT, padded),)

    def compare(self, reach: Reach, length: int) -> None:
        """Compare what the forward just done let the newest of ``length`` tokens see, without waiting for it."""
        if self.sights:
            assert self.keys is not None  # those that it saw
            device = self.keys.device
            self._differs = torch.stack([sight.differs(reach, length, device) for sight in self.sights]).any()
            self.sights = ()

    @property
    def differs(self) -> bool | None:
        """Whether the model's mask was another than the layer's reach; ``None``: its attention was not seen."""
        if isinstance(self._differs, Tensor):
            self._differs = bool(self._differs)
        return self._differs


class WatchedSlidingLayer(WatchedLayer, DynamicSlidingWindowLayer):
    """A watched layer with a window."""


WATCHED: dict[type, type[WatchedLayer]] = {DynamicLayer: WatchedLayer, DynamicSlidingWindowLayer: WatchedSlidingLayer}


def watch(layer: Layer) -> Layer:
    """Make a stock layer a watched one, in place; layers of other kinds stay as they are."""
    if (kind := WATCHED.get(type(layer))) is not None:
        layer.__class__ = kind  # type: ignore[assignment]  # a subclass of its own, without other attributes
    return layer


def _states(mask_BHT: Tensor) -> Tensor:
    if mask_BHT.dtype == torch.bool:
        return mask_BHT.to(torch.int8)
    hidden_BHT = mask_BHT <= torch.finfo(mask_BHT.dtype).min / 2
    return torch.where(hidden_BHT, HIDDEN, torch.where(mask_BHT == 0, VISIBLE, BIASED)).to(torch.int8)
