"""Quest (Tang et al., ICML 2024, arXiv 2406.10774, section 3.3): an upper bound on each block's logits from its keys.

As in the paper: pages of 16 tokens (``block_size``), each judged by the smallest and largest element of its keys in
every channel, the best taken with the current query. Its first two layers attend to everything: ``skip_layers=(0, 1)``
does that. Adapted: query heads that share a KV head share its pages, chosen by the largest of their bounds; sink and
recent are always among them.

Suffixes: B sequences, G KV heads, H query heads, M query heads of a KV head, Q queries, T tokens, D head size, N
blocks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.errors import IntegrityError
from attention_predictor.offload.policies.base import LayerSpec, Policy, ReadKeys, Step, When


class KeyBounds:
    """Smallest and largest key element of each block and channel, on the device.

    Written in place, in room that doubles: outside of inference mode, whose tensors could not be written to elsewhere.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.block_size = spec.config.block_size
        self.length = 0
        self._room_2BGND = torch.empty(
            (2, spec.batch, spec.kv_heads, 0, spec.head_dim), dtype=spec.dtype, device=spec.device
        )

    @property
    def low_BGND(self) -> Tensor:
        """The smallest elements."""
        return self._room_2BGND[0, :, :, : self.n_blocks]

    @property
    def high_BGND(self) -> Tensor:
        """The largest elements."""
        return self._room_2BGND[1, :, :, : self.n_blocks]

    @property
    def n_blocks(self) -> int:
        return -(-self.length // self.block_size)

    @torch.no_grad()
    def extend(self, key_BGTD: Tensor) -> None:
        """Take new keys; they first fill up the last block."""
        T, last = key_BGTD.shape[2], self.n_blocks - 1
        free = min(-self.length % self.block_size, T)
        self.length += T
        self._reserve(self.n_blocks)
        low_BGND, high_BGND = self._room_2BGND
        if free:
            head_BGTD = key_BGTD[:, :, :free]
            low_BGND[:, :, last] = torch.minimum(low_BGND[:, :, last], head_BGTD.amin(2))
            high_BGND[:, :, last] = torch.maximum(high_BGND[:, :, last], head_BGTD.amax(2))
        whole = (T - free) // self.block_size
        blocks_BGNTD = key_BGTD[:, :, free : free + whole * self.block_size].unflatten(2, (whole, self.block_size))
        low_BGND[:, :, last + 1 : last + 1 + whole] = blocks_BGNTD.amin(3)
        high_BGND[:, :, last + 1 : last + 1 + whole] = blocks_BGNTD.amax(3)
        if free + whole * self.block_size < T:
            tail_BGTD = key_BGTD[:, :, free + whole * self.block_size :]
            low_BGND[:, :, last + 1 + whole] = tail_BGTD.amin(2)
            high_BGND[:, :, last + 1 + whole] = tail_BGTD.amax(2)

    def _reserve(self, blocks: int) -> None:
        more = max(blocks, 2 * self._room_2BGND.shape[3]) - self._room_2BGND.shape[3]
        if blocks > self._room_2BGND.shape[3]:
            with torch.inference_mode(False):
                self._room_2BGND = F.pad(self._room_2BGND, (0, 0, 0, more))

    def bound(self, query_BHD: Tensor) -> Tensor:
        """``[B, G, N]`` largest logit any key within the bounds could have, over the query heads of a KV head."""
        B, G, _, D = self.low_BGND.shape
        query_BGMD = query_BHD.float().view(B, G, -1, D)
        # The larger of q·low and q·high in each channel: positive elements meet the high bound, negative the low.
        high = query_BGMD.clamp_min(0) @ self.high_BGND.float().transpose(-1, -2)
        low = query_BGMD.clamp_max(0) @ self.low_BGND.float().transpose(-1, -2)
        return (high + low).amax(2)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        self.length = length // self.block_size * self.block_size
        if length > self.length:
            self.extend(read_keys(self.length, length).to(self.low_BGND.device))

    def index(self, batch_index: Tensor) -> None:
        with torch.inference_mode(False):
            self._room_2BGND = self._room_2BGND[:, batch_index]

    @property
    def nbytes(self) -> int:
        return self._room_2BGND.nbytes

    def check_integrity(self) -> None:
        if self._room_2BGND.shape[3] < self.n_blocks:
            raise IntegrityError(f"room for key bounds of {self._room_2BGND.shape[3]} blocks: expected {self.n_blocks}")
        if not bool((self.low_BGND <= self.high_BGND).all()):
            raise IntegrityError("key bounds: a low bound is above its high bound")


class Quest(Policy):
    """Top blocks by the bound of the current query; fetched within the step."""

    name = "quest"
    selects: ClassVar[When] = "now"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.bounds = KeyBounds(spec)

    @property
    def parts(self) -> dict[str, KeyBounds]:  # type: ignore[override]
        return {"bounds": self.bounds}

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        self.bounds.extend(key_BGTD)

    def score_now(self, step: Step) -> Tensor:
        return self.bounds.bound(step.query_BHD)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        self.bounds.crop(length, read_keys)


class QuestAhead(Quest):
    """The same bound with the previous token's query, so that the fetch can be made ahead."""

    name = "quest-ahead"
    selects = "ahead"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.scores_BGN: Tensor | None = None

    def observe(self, step: Step) -> None:
        self.scores_BGN = self.bounds.bound(step.query_BHD)

    def score_next(self, length: int) -> Tensor | None:
        return self.scores_BGN

    def index(self, batch_index: Tensor) -> None:
        super().index(batch_index)
        if self.scores_BGN is not None:
            self.scores_BGN = self.scores_BGN[batch_index]
