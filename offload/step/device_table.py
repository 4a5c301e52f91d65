"""DeviceTable: which block is in which slot, kept on the device, for steps that never ask the host.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, C capacity in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.host_store import HostStore
from attention_predictor.offload.blocks.residency import ResidencyTable
from attention_predictor.offload.policies.selection import Selection, less_than


class DeviceTable:
    """What ``Selection`` and ``ResidencyTable`` do, by kernels: the same scores leave the same blocks in the pool.

    Made from a ``ResidencyTable`` when steps begin that the host takes no part in, and given back to it (``leave``)
    when they end. Lengths are read on the device, so that a captured step serves every token up to the capacity.

    Attributes:
        block_BGS, active_BGS: int64, block in each slot, and those of them that this step attends to; -1 for none.
        counts: As ``DeviceCounts.of_layer``.
    """

    def __init__(
        self,
        table: ResidencyTable,
        selection: Selection,
        store: HostStore,
        pool: BlockPool,
        *,
        capacity: int,
        length: int,
        counts: Tensor,
    ) -> None:
        device, self.selection, self.store, self.pool = pool.key_BGSTD.device, selection, store, pool
        B, G, S = pool.key_BGSTD.shape[:3]
        R = B * G
        # Stamps go on from here: the device's are twice the length, and one more for what is chosen ahead.
        last = 2 * length
        commit_RS = table.commits_of_slots()
        block_RS = table.block_of_slot_RS
        slot_RC = torch.full((R, capacity + 1), -1, dtype=torch.int32)
        slot_S = torch.arange(S, dtype=torch.int32).expand(R, S)
        # Empty slots write to one column more, which is cut off.
        slot_RC.scatter_(1, block_RS % (capacity + 1), slot_S)
        self.slots = ops.SlotTable(
            block_RS=block_RS.to(device, copy=True),
            active_RS=block_RS.masked_fill(~table.active_RS, -1).to(device),
            use_RS=(last - (commit_RS.max() - commit_RS)).to(device),
            slot_RC=slot_RC[:, :-1].contiguous().to(device),
            move_block_RS=torch.zeros((R, S), dtype=torch.int32, device=device),
            move_slot_RS=torch.zeros((R, S), dtype=torch.int32, device=device),
            moves_R=torch.zeros(R, dtype=torch.int32, device=device),
            key_RC=torch.zeros((R, capacity), dtype=torch.int32, device=device),
        )
        self.block_BGS, self.active_BGS = (x.view(B, G, S) for x in self.slots[:2])
        self.counts = counts
        self.less_G = less_than(selection.budget, selection.heads, device)
        self.slab_s = store.addresses(device)

    @property
    def nbytes(self) -> int:
        """Device memory."""
        tensors = (*self.slots, self.counts, self.slab_s, self.less_G)
        return sum(x.nbytes for x in tensors if x is not None)

    def append(self, key_BGD: Tensor, value_BGD: Tensor, length_1: Tensor) -> None:
        """Write the newest token to its block in the pool and in host memory; ``length_1`` counts it already."""
        ops.append_token(
            key_BGD,
            value_BGD,
            self.pool.key_BGSTD,
            self.pool.value_BGSTD,
            self.slab_s,
            self.store.slab_blocks,
            self.slots.slot_RC,
            length_1,
            self.counts[4:],
        )

    def choose(
        self,
        peak_BHC: Tensor,
        sum_BHC: Tensor,
        resident: tuple[Tensor, Tensor] | None,
        late_blocks: int,
        length_1: Tensor,
        padding_B: Tensor,
        spent_1: Tensor,
    ) -> Tensor:
        """Choose what this token attends to, among what is resident and ``late_blocks`` others, and fetch these.

        Args:
            peak_BHC, sum_BHC: Estimates of all blocks; where ``resident``, the exact scores of slots, is given, these
                count in their places. Without it nothing is chosen: the step attends to what was chosen ahead.
            spent_1: int64, adds up the nanoseconds that late fetches take.

        Returns:
            fp32 rest_BH, log-sum-exp of the blocks not attended to.
        """
        limits = self._limits(self.selection.budget, length_1, padding_B)
        rest_BH = ops.choose_blocks(self.slots, limits, peak_BHC, sum_BHC, resident, late_blocks, self.counts[:2])
        if resident is not None:
            self._fetch(spent_1)
        return rest_BH

    def choose_ahead(self, score_BGC: Tensor, more: int, length_1: Tensor, padding_B: Tensor) -> None:
        """Choose what the next token attends to, and ``more`` blocks, and fetch them."""
        limit = self.selection.budget + more * self.selection.block_size
        ops.choose_ahead(self.slots, self._limits(limit, length_1, padding_B), score_BGC, self.counts[2:4])
        self._fetch(None)

    def leave(self, table: ResidencyTable) -> None:
        """Give the state back to the host's table; waits for the device."""
        block_RS, active_RS, commit_RS = (x.cpu() for x in self.slots[:3])
        filled_RS = block_RS >= 0
        if filled_RS.any():
            commit_RS = commit_RS - commit_RS[filled_RS].min() + 1
        table.load(block_RS, active_RS >= 0, commit_RS)

    def _limits(self, limit: int, length_1: Tensor, padding_B: Tensor) -> ops.Limits:
        selection = self.selection
        always = (selection.sink // selection.block_size, selection.recent)
        return ops.Limits(length_1, padding_B, self.less_G, selection.block_size, limit, *always)

    def _fetch(self, spent_1: Tensor | None) -> None:
        moves = (self.slots.move_block_RS, self.slots.move_slot_RS, self.slots.moves_R)
        pool = (self.pool.key_BGSTD, self.pool.value_BGSTD)
        ops.move_blocks(self.slab_s, self.store.slab_blocks, *moves, *pool, spent_1)
