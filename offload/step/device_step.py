"""DeviceStep: one layer's decoding step as kernels in a row, none of which waits for the host.

The same step as ``TieredLayer`` takes with the prefetch thread, for the predictor's policy: append, choose, fetch late,
attend; then, beside the layers that follow, observe, predict, choose ahead and fetch.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, S slots, D head size, C capacity in blocks, L
capacity in tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.errors import AttachError
from attention_predictor.offload.attention.dense import Terms
from attention_predictor.offload.attention.sparse import attend_slots, score_slots
from attention_predictor.offload.policies.predictor import Predictor
from attention_predictor.offload.step.device_table import DeviceTable

if TYPE_CHECKING:
    from attention_predictor.offload.hf.layer import TieredLayer

# Layers whose fetches for the next token may be under way before the next layer's step waits for the first of them:
# what a step holds in the meantime takes memory, and four layers are enough to hide behind.
DEPTH = 4


class Shared:
    """What the steps of all layers of one cache share: its length on the device, and the streams beside the model's.

    Attributes:
        capacity: Tokens that the step has room for.
        length_1: int64 on the device, tokens of each sequence, the one in progress included.
        padding_B: int64, tokens of left padding; ``real_BL``: bool, False at padding, ``None`` where there is none.
        spent_1: int64 nanoseconds for which steps stood still: late fetches, and the wait for the last ones ahead.
    """

    def __init__(self, length: int, capacity: int, padding_B: Tensor, spent_1: Tensor) -> None:
        device = padding_B.device
        self.capacity = capacity
        self.length_1 = torch.tensor([length], device=device)
        self.padding_B = padding_B
        self.spent_1 = spent_1
        token_L = torch.arange(capacity, device=device)
        self.real_BL = (token_L >= padding_B[:, None]).contiguous() if bool(padding_B.any()) else None
        self.side, self.second = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._under_way: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is done within goes to a second stream, beside what follows on the model's, until ``meet``.

        What it makes is the second stream's memory: used again when that stream comes to the next layer, behind
        whatever the model's stream does now.
        """
        if self.second is None:
            yield
            return
        self.second.wait_stream(torch.cuda.current_stream(self.second.device))
        with torch.cuda.stream(self.second):
            yield

    def meet(self) -> None:
        """Order the model's stream behind the second one."""
        if self.second is not None:
            torch.cuda.current_stream(self.second.device).wait_stream(self.second)

    @contextmanager
    def aside(self, held: object) -> Iterator[None]:
        """What is done within goes to the side stream, behind what is queued now.

        ``held`` are the tensors that it reads and the model's stream has made: their memory must not be used again
        before it is through.
        """
        if self.side is None:
            yield
            return
        main = torch.cuda.current_stream(self.side.device)
        while len(self._under_way) >= DEPTH:
            self._wait(main)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            yield
            done = torch.cuda.Event()
            done.record(self.side)
        self._under_way.append((done, held))

    def join(self) -> None:
        """Order the model's stream behind all that went to the side; the wait counts as exposed."""
        ops.note_time(self.spent_1, -1)
        while self.side is not None and self._under_way:
            self._wait(torch.cuda.current_stream(self.side.device))
        ops.note_time(self.spent_1, 1)

    def _wait(self, main: torch.cuda.Stream) -> None:
        done, _ = self._under_way.popleft()
        main.wait_event(done)


class DeviceStep:
    """One layer's step; made when its cache has room for ``shared.capacity`` tokens."""

    def __init__(self, layer: TieredLayer, shared: Shared) -> None:
        assert isinstance(layer.policy, Predictor)
        assert layer.policy.sketch is not None
        self.shared, self.tiers, self.policy, self.selection = shared, layer.tiers, layer.policy, layer.selection
        self.sketch, self.history = layer.policy.sketch, layer.policy.history
        self.arrived_BH: Tensor | None = None  # made for the first query: only it tells how many heads there are
        self.table = DeviceTable(
            self.tiers.table,
            self.selection,
            self.tiers.store,
            self.tiers.pool,
            capacity=self.selection.n_blocks(shared.capacity),
            length=self.tiers.length,
            counts=layer.runtime.counts.of_layer(layer.number, self.tiers.block_bytes),
        )

    def attend(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        """Attention of the newest token, which ``shared.length_1`` counts already; ``[B, H, 1, D]``."""
        if query_BHQD.shape[2] != 1 or key_BGTD.shape[2] != 1:
            raise AttachError(f"a step on the device takes one token a sequence, got {key_BGTD.shape[2]}")
        shared, policy = self.shared, self.policy
        query_BHD, key_BGD = query_BHQD[:, :, 0].contiguous(), key_BGTD[:, :, 0].contiguous()
        if self.arrived_BH is None:
            self.arrived_BH = query_BHD.new_zeros(query_BHD.shape[:2], dtype=torch.int32)
        with shared.beside():
            self.sketch.append(key_BGD, shared.length_1)
            peak_BHC, sum_BHC = self.sketch.block_scores(
                query_BHD,
                terms.scaling,
                terms.softcap,
                block_size=self.selection.block_size,
                real_BL=shared.real_BL,
                kernel=True,
                length=shared.capacity,
                length_1=shared.length_1,
            )
        self.table.append(key_BGD, value_BGTD[:, :, 0].contiguous(), shared.length_1)
        pool, room = self.tiers.pool, (shared.capacity, shared.real_BL, terms)
        resident = None
        if policy.chooses:
            resident = score_slots(
                query_BHD, pool.key_BGSTD, self.table.block_BGS, *room, kernel=True, length_1=shared.length_1
            )
        shared.meet()
        late_blocks = self.selection.share(policy.late_share)
        rest_BH = self.table.choose(
            peak_BHC, sum_BHC, resident, late_blocks, shared.length_1, shared.padding_B, shared.spent_1
        )
        attention = attend_slots(
            query_BHD,
            pool.key_BGSTD,
            pool.value_BGSTD,
            self.table.active_BGS,
            *room,
            kernel=True,
            length_1=shared.length_1,
            arrived_BH=self.arrived_BH,
        )
        slot_peak_BHS = attention.scores.peak_BHS
        with shared.aside((peak_BHC, rest_BH, slot_peak_BHS, attention.lse_BH)):
            total_BH = torch.logaddexp(attention.lse_BH, rest_BH)
            self.history.observe_slots(peak_BHC, self.table.active_BGS, slot_peak_BHS, total_BH, shared.length_1)
            first, blocks = self.selection.sink // self.selection.block_size, peak_BHC.shape[2]
            padding_B = None if shared.real_BL is None else shared.padding_B
            score_BGC = self.history.predict_ahead(first, self.selection.recent, shared.length_1, blocks, padding_B)
            more = self.selection.ahead_blocks if policy.chooses else 0
            self.table.choose_ahead(score_BGC, more, shared.length_1, shared.padding_B)
        return attention.out_BHD[:, :, None]

    def advance(self) -> None:
        """The host's counts follow, one token on."""
        self.tiers.store.advance(1)
        self.sketch.advance(1)
        self.history.advance(self.tiers.store.n_blocks)

    def leave(self) -> None:
        """The host's table takes over."""
        self.table.leave(self.tiers.table)
