"""DeviceTable: which block is in which slot, kept on the device, for steps that never ask the host.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, S slots, C capacity in blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.offload.block_pool import BlockPool
from attention_predictor.offload.host_store import HostStore
from attention_predictor.offload.residency import ResidencyTable
from attention_predictor.offload.selection import Selection, less_than


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
        self.use_RS = (last - (commit_RS.max() - commit_RS)).to(device)
        self.block_BGS = table.block_of_slot_RS.view(B, G, S).to(device)
        self.active_BGS = table.block_of_slot_RS.masked_fill(~table.active_RS, -1).view(B, G, S).to(device)
        slot_RC = torch.full((R, capacity + 1), -1, dtype=torch.int32)
        slot_S = torch.arange(S, dtype=torch.int32).expand(R, S)
        # Empty slots write to one column more, which is cut off.
        slot_RC.scatter_(1, table.block_of_slot_RS % (capacity + 1), slot_S)
        self.slot_RC = slot_RC[:, :-1].contiguous().to(device)
        self.move_block_RS = torch.zeros((R, S), dtype=torch.int32, device=device)
        self.move_slot_RS = torch.zeros_like(self.move_block_RS)
        self.moves_R = torch.zeros(R, dtype=torch.int32, device=device)
        self.key_RC = torch.zeros((R, capacity), dtype=torch.int32, device=device)
        self.counts = counts
        self.less_G = less_than(selection.budget, selection.heads, device)
        self.slab_s = store.addresses(device)

    @property
    def nbytes(self) -> int:
        """Device memory."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def append(self, key_BGD: Tensor, value_BGD: Tensor, length_1: Tensor) -> None:
        """Write the newest token to its block in the pool and in host memory; ``length_1`` counts it already."""
        ops.append_token(
            key_BGD,
            value_BGD,
            self.pool.key_BGSTD,
            self.pool.value_BGSTD,
            self.slab_s,
            self.store.slab_blocks,
            self.slot_RC,
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
        rest_BH = ops.choose_blocks(
            peak_BHC,
            sum_BHC,
            *(resident or (None, None)),
            *self._tables(),
            self.counts[:2],
            length_1,
            padding_B,
            self.less_G,
            self.block_BGS.shape[1],
            self.selection.block_size,
            self.selection.budget,
            late_blocks,
            self.selection.sink // self.selection.block_size,
            self.selection.recent,
            resident is not None,
        )
        if resident is not None:
            self._fetch(spent_1)
        return rest_BH

    def choose_ahead(self, score_BGC: Tensor, more: int, length_1: Tensor, padding_B: Tensor) -> None:
        """Choose what the next token attends to, and ``more`` blocks, and fetch them."""
        size = self.selection.block_size
        ops.choose_ahead(
            score_BGC,
            *self._tables(),
            self.counts[2:4],
            length_1,
            padding_B,
            self.less_G,
            size,
            self.selection.budget + more * size,
            self.selection.sink // size,
            self.selection.recent,
        )
        self._fetch(None)

    def leave(self, table: ResidencyTable) -> None:
        """Give the state back to the host's table; waits for the device."""
        block_RS, active_RS, commit_RS = (
            x.flatten(0, -2).cpu() for x in (self.block_BGS, self.active_BGS, self.use_RS)
        )
        filled_RS = block_RS >= 0
        if filled_RS.any():
            commit_RS = commit_RS - commit_RS[filled_RS].min() + 1
        table.load(block_RS, active_RS >= 0, commit_RS)

    def _tables(self) -> tuple[Tensor, ...]:
        rows = (self.block_BGS.flatten(0, 1), self.active_BGS.flatten(0, 1), self.use_RS, self.slot_RC)
        return (*rows, self.move_block_RS, self.move_slot_RS, self.moves_R, self.key_RC)

    def _fetch(self, spent_1: Tensor | None) -> None:
        ops.move_blocks(
            self.slab_s,
            self.store.slab_blocks,
            self.move_block_RS,
            self.move_slot_RS,
            self.moves_R,
            self.pool.key_BGSTD,
            self.pool.value_BGSTD,
            spent_1,
        )
