"""Quest (Tang et al., ICML 2024, arXiv 2406.10774, section 3.3): an upper bound on each block's logits from its keys.

As in the paper: pages of 16 tokens (``block_size``), each judged by the smallest and largest element of its keys in
every channel, the best taken with the current query. Its first two layers attend to everything: ``skip_layers=(0, 1)``
does that. Adapted: query heads that share a KV head share its pages, chosen by the largest of their bounds; sink and
recent are always among them.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size, E = 2·D, C block capacity.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.attention.dense import Terms, scaled_logits
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.policies.base import BlockValues, LayerSpec, Part, Policy, ReadKeys, Step, When
from attention_predictor.predictor.sequences import put_sequence

NOTHING = -1e4  # bound of a block without keys: any key moves it, and no product with it is infinite


class KeyBounds:
    """Largest element of each block and channel, of the keys and of the keys negated: bound_BGCE, E = 2·D.

    With the query's positive elements beside those of the query negated, one product gives the bound: positive elements
    meet the largest key, negative ones the smallest. On the device, written in place.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.block_size = spec.config.block_size
        self.length = 0  # as the host counts
        with torch.inference_mode(False):
            shape = (spec.batch, spec.kv_heads, 0, 2 * spec.head_dim)
            self.bound_BGCE = torch.empty(shape, dtype=spec.dtype, device=spec.device)

    @property
    def capacity(self) -> int:
        """Blocks there is room for."""
        return self.bound_BGCE.shape[2]

    @torch.inference_mode(False)
    def reserve(self, capacity: int) -> None:
        if capacity > self.capacity:
            self.bound_BGCE = F.pad(self.bound_BGCE, (0, 0, 0, capacity - self.capacity), value=NOTHING)

    @torch.no_grad()
    def extend(self, key_BGTD: Tensor) -> None:
        """Take new keys; they first fill up the last block."""
        start, self.length = self.length, self.length + key_BGTD.shape[2]
        first, last = start // self.block_size, ceil_div(self.length, self.block_size)
        self.reserve(last)
        before, after = start - first * self.block_size, last * self.block_size - self.length
        for sign, part_BGCD in zip((1, -1), self.bound_BGCE[:, :, first:last].chunk(2, -1), strict=True):
            padded_BGTD = F.pad(sign * key_BGTD, (0, 0, before, after), value=NOTHING)
            part_BGCD.copy_(torch.maximum(part_BGCD, padded_BGTD.unflatten(2, (-1, self.block_size)).amax(3)))

    def append(self, key_BGD: Tensor, extent: Extent) -> None:
        """Take the newest token's key; ``extent`` counts it already."""
        key_BG1E = torch.cat([key_BGD, -key_BGD], -1)[:, :, None]
        block_BG1E = (extent.n_blocks_B - 1)[:, None, None, None].expand_as(key_BG1E)
        self.bound_BGCE.scatter_(2, block_BG1E, torch.maximum(self.bound_BGCE.gather(2, block_BG1E), key_BG1E))

    def bound(self, query_BHD: Tensor) -> Tensor:
        """fp32 ``[B, G, C]``, largest logit any key within the bounds could have, over the query heads of a KV head.

        Very low for a block that has not begun.
        """
        query_BHE = torch.cat([query_BHD, -query_BHD], -1).relu_()
        bound_BHC = scaled_logits(query_BHE[:, :, None], self.bound_BGCE, Terms(1.0))[:, :, 0]
        return bound_BHC.unflatten(1, (self.bound_BGCE.shape[1], -1)).amax(2)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        self.length = length // self.block_size * self.block_size
        self.bound_BGCE[:, :, self.length // self.block_size :] = NOTHING
        if length > self.length:
            self.extend(read_keys(self.length, length).to(self.bound_BGCE.device))

    @torch.inference_mode(False)
    def index(self, batch_index: Tensor) -> None:
        self.bound_BGCE = self.bound_BGCE[batch_index]

    def put(self, place: int, other: KeyBounds) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        put_sequence(self.bound_BGCE, place, other.bound_BGCE, NOTHING)
        self.length = max(self.length, other.length)

    @property
    def nbytes(self) -> int:
        return self.bound_BGCE.nbytes

    def check_integrity(self) -> None:
        n_blocks = ceil_div(self.length, self.block_size)
        if self.capacity < n_blocks:
            raise IntegrityError(f"room for key bounds of {self.capacity} blocks: expected {n_blocks}")
        high_BGND, minus_low_BGND = self.bound_BGCE[:, :, :n_blocks].chunk(2, -1)
        if not bool((high_BGND >= -minus_low_BGND).all()):
            raise IntegrityError("key bounds: a low bound is above its high bound")


class Quest(Policy):
    """Top blocks by the bound of the current query; fetched within the step."""

    name = "quest"
    selects: ClassVar[When] = "now"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.bounds = KeyBounds(spec)

    @property
    def parts(self) -> dict[str, Part]:
        return {"bounds": self.bounds}

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        self.bounds.extend(key_BGTD)

    def append(self, key_BGD: Tensor, query_BHD: Tensor, extent: Extent) -> None:
        self.bounds.append(key_BGD, extent)

    def advance(self) -> None:
        self.bounds.length += 1

    def score_now(self, step: Step) -> Tensor | None:
        return self.bounds.bound(step.query_BHD)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        self.bounds.crop(length, read_keys)


class QuestAhead(Quest):
    """The same bound with the previous token's query, so that the fetch can be made ahead."""

    name = "quest-ahead"
    selects = "ahead"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.scores = BlockValues(spec)

    @property
    def parts(self) -> dict[str, Part]:
        return {**super().parts, "scores": self.scores}

    def score_now(self, step: Step) -> None:
        """Nothing is chosen within the step."""

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        super().extend(key_BGTD, query_BHQD)
        self._score(query_BHQD[:, :, -1])

    def observe(self, step: Step) -> None:
        self._score(step.query_BHD)

    def _score(self, query_BHD: Tensor) -> None:
        self.scores.reserve(self.bounds.capacity)
        self.scores.value_BGC.copy_(self.bounds.bound(query_BHD))

    def score_next(self, extent: Extent) -> Tensor:
        return self.scores.value_BGC

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        super().crop(length, read_keys)
        self.scores.crop(ceil_div(length, self.bounds.block_size))
