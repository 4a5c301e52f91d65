"""Which block is in which slot, and what has to be fetched for a new set of wanted blocks.

Letters: R rows (row = b*G + g), N blocks, S slots, W wanted blocks, n list entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention_predictor.errors import IntegrityError

# A slot's last use is one number: the commit that wanted its block, and the block. Among blocks wanted last at the same
# time the lower one goes first, whatever slots they are in: the same requests leave the same blocks resident.
COMMIT_SHIFT = 32


@dataclass(frozen=True)
class Plan:
    """What makes `wanted_RW` resident: fetch `block_n[i]` of row `row_n[i]` into its slot `slot_n[i]`.

    All int64 on the CPU. `victim_n` is the block that the fetch overwrites, -1 where the slot was empty;
    `slot_RW` the slot of every wanted block once the plan is carried out, -1 for no wish. `version` is that
    of the table that the plan was made from.
    """

    row_n: Tensor
    block_n: Tensor
    slot_n: Tensor
    victim_n: Tensor
    wanted_RW: Tensor
    slot_RW: Tensor
    version: int


class ResidencyTable:
    """Block to slot and slot to block, of every row of one layer, on the CPU.

    `block_of_slot_RS`: int64, -1 where empty. `active_RS`: the slots whose block is in the wanted set
    committed last; attention reads exactly these.
    """

    def __init__(self, *, rows: int, slots: int) -> None:
        # The block-to-slot map takes 4 bytes where the block itself takes kilobytes of host memory, and makes
        # look-ups independent of the context length. Its first column stands for block -1, never in a slot.
        with torch.inference_mode(False):  # inference tensors could not be written to outside of that mode
            self.block_of_slot_RS = torch.full((rows, slots), -1)
            self.active_RS = torch.zeros((rows, slots), dtype=torch.bool)
            self._slot_of_block_RN = torch.full((rows, 1), -1, dtype=torch.int32)
            self._use_RS = torch.arange(slots).repeat(rows, 1)
        self._commits = 0
        self._version = 0

    @property
    def rows(self) -> int:
        """Rows, B·G."""
        return self.block_of_slot_RS.shape[0]

    @property
    def slots(self) -> int:
        """Slots per row."""
        return self.block_of_slot_RS.shape[1]

    def plan(self, wanted_RW: Tensor) -> Plan:
        """The fetches that `wanted_RW` needs; changes nothing.

        `wanted_RW`: int64 block numbers, distinct in a row, -1 for no wish. Resident blocks are reused;
        missing ones get empty slots first, then those of unwanted blocks, least recently wanted first. Raises
        ValueError when a row has more wishes than slots, or a missing block twice.
        """
        wanted_RW = wanted_RW.to("cpu", torch.int64, copy=True)  # the plan must not change with its maker
        self._check_wanted(wanted_RW)
        slot_RW = self._slots_of(wanted_RW)
        row_n, wish_n = ((slot_RW < 0) & (wanted_RW >= 0)).nonzero(as_tuple=True)
        block_n = wanted_RW[row_n, wish_n]
        slot_n = victim_n = block_n
        if row_n.numel():
            _check_distinct(row_n, block_n)
            first_R = torch.searchsorted(row_n, torch.arange(self.rows))  # where each row's fetches begin
            rank_n = torch.arange(row_n.numel()) - first_R[row_n]
            slot_n = self._slots_by_use(slot_RW, row_n, rank_n)
            victim_n = self.block_of_slot_RS[row_n, slot_n]
            slot_RW[row_n, wish_n] = slot_n
        return Plan(row_n, block_n, slot_n, victim_n, wanted_RW, slot_RW, self._version)

    def commit(self, plan: Plan) -> None:
        """Records that the plan's copies are done, or ordered before whatever reads them.

        Its wanted blocks become the active ones. Raises IntegrityError, changing nothing, if the table has
        changed since the plan was made.
        """
        if plan.version != self._version:
            raise IntegrityError(f"the plan is stale: made at version {plan.version}, table is at {self._version}")
        self._version += 1
        self._commits += 1
        self._reserve(int(plan.block_n.max()) + 1 if plan.block_n.numel() else 0)
        # Column 0, block -1, takes what an empty slot gives up.
        self._slot_of_block_RN[plan.row_n, plan.victim_n + 1] = -1
        self._slot_of_block_RN[plan.row_n, plan.block_n + 1] = plan.slot_n.int()
        self.block_of_slot_RS[plan.row_n, plan.slot_n] = plan.block_n
        self.active_RS.copy_(_mark(plan.slot_RW, self.slots))
        self._use_RS.copy_(torch.where(self.active_RS, self._uses(torch.tensor(self._commits)), self._use_RS))

    def slot_of(self, block_R: Tensor) -> Tensor:
        """The slot [R] of one block of every row, -1 where it is not resident (or the block is -1)."""
        return self._slots_of(block_R[:, None])[:, 0]

    def resident(self, n_blocks: int) -> Tensor:
        """Which of the first `n_blocks` blocks are in a slot: bool [R, N]."""
        return _mark(self.block_of_slot_RS.masked_fill(self.block_of_slot_RS >= n_blocks, -1), n_blocks)

    def active_blocks(self, n_blocks: int) -> Tensor:
        """Which of the first `n_blocks` blocks attention reads: bool [R, N]."""
        hidden_RS = ~self.active_RS | (self.block_of_slot_RS >= n_blocks)
        return _mark(self.block_of_slot_RS.masked_fill(hidden_RS, -1), n_blocks)

    def drop_from(self, block: int) -> None:
        """Empties the slots of every block from number `block` on (the context was cropped)."""
        gone_RS = self.block_of_slot_RS >= block
        self.block_of_slot_RS.masked_fill_(gone_RS, -1)
        self.active_RS.masked_fill_(gone_RS, False)
        torch.where(gone_RS, torch.arange(self.slots), self._use_RS, out=self._use_RS)
        self._slot_of_block_RN[:, block + 1 :] = -1
        self._version += 1

    def grow(self, slots: int) -> None:
        """Adds empty slots; plans stay valid."""
        if slots < self.slots:
            raise ValueError(f"slots must be at least {self.slots}, got {slots}")
        with torch.inference_mode(False):
            use_RS = torch.arange(slots).repeat(self.rows, 1)
            use_RS[:, : self.slots] = self._use_RS
            self._use_RS = use_RS
            self.block_of_slot_RS = _widen(self.block_of_slot_RS, slots, -1)
            self.active_RS = _widen(self.active_RS, slots, False)

    def index(self, batch_index: Tensor, kv_heads: int) -> None:
        """Makes the rows of sequence i what those of sequence `batch_index[i]` were (beams)."""
        row_R = (batch_index.cpu()[:, None] * kv_heads + torch.arange(kv_heads)).flatten()
        with torch.inference_mode(False):
            self.block_of_slot_RS = self.block_of_slot_RS[row_R]
            self.active_RS = self.active_RS[row_R]
            self._slot_of_block_RN = self._slot_of_block_RN[row_R]
            self._use_RS = self._use_RS[row_R]
        self._version += 1

    def commits_of_slots(self) -> Tensor:
        """The commit that wanted each slot's block last, int64 [R, S]; 0 for an empty slot."""
        return self._use_RS >> COMMIT_SHIFT

    def load(self, block_of_slot_RS: Tensor, active_RS: Tensor, commit_RS: Tensor) -> None:
        """Takes over what another keeper of the same slots has made of them.

        `commit_RS`: numbers from 1 on, the larger the later each block was wanted; not read where a slot is empty.
        """
        filled_RS = block_of_slot_RS >= 0
        with torch.inference_mode(False):
            self.block_of_slot_RS = block_of_slot_RS.clone()
            self.active_RS = active_RS.clone()
            self._slot_of_block_RN.fill_(-1)
        self._reserve(int(block_of_slot_RS.max()) + 1 if block_of_slot_RS.numel() else 0)
        row_n, slot_n = filled_RS.nonzero(as_tuple=True)
        self._slot_of_block_RN[row_n, block_of_slot_RS[row_n, slot_n] + 1] = slot_n.int()
        self._commits = max(self._commits, int(commit_RS[filled_RS].max()) if filled_RS.any() else 0)
        self._use_RS.copy_(torch.where(filled_RS, self._uses(commit_RS), torch.arange(self.slots)))
        self._version += 1

    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, unless every resident block has one slot, both maps
        are inverse, and slots are active or have a last use only when filled."""
        filled_RS = self.block_of_slot_RS >= 0
        # One entry a filled slot, each pointing back: that also excludes a block in two slots.
        mapped, filled = int((self._slot_of_block_RN >= 0).sum()), int(filled_RS.sum())
        if mapped != filled:
            raise IntegrityError(f"{filled} slots are filled, found {mapped} blocks with a slot")
        back_RS = self._slots_of(self.block_of_slot_RS)
        wrong_n2 = ((back_RS != torch.arange(self.slots)) & filled_RS).nonzero()
        for row, slot in wrong_n2[:1].tolist():
            block, back = int(self.block_of_slot_RS[row, slot]), int(back_RS[row, slot])
            raise IntegrityError(f"row {row}: slot {slot} holds block {block}, found under slot {back}")
        if (active := int((self.active_RS & ~filled_RS).sum())) > 0:
            raise IntegrityError(f"{active} empty slots are active")
        if not torch.equal(self._use_RS >> COMMIT_SHIFT > 0, filled_RS):
            raise IntegrityError("a filled slot was never wanted, or an empty one has a last use")

    def _uses(self, commit: Tensor) -> Tensor:
        block_RS = self.block_of_slot_RS
        return (commit << COMMIT_SHIFT) + block_RS

    def _slots_of(self, block_RW: Tensor) -> Tensor:
        blocks = self._slot_of_block_RN.shape[1] - 1
        if block_RW.numel() and int(block_RW.max()) >= blocks:
            block_RW = block_RW.masked_fill(block_RW >= blocks, -1)
        return self._slot_of_block_RN.gather(1, block_RW + 1).long()

    def _slots_by_use(self, kept_RW: Tensor, row_n: Tensor, rank_n: Tensor) -> Tensor:
        """The `rank_n[i]`-th slot that row `row_n[i]` can give away: empty ones come first, then the least
        recently wanted, and never one of `kept_RW`."""
        # Numpy sorts short rows several times faster than torch does.
        use_RS = self._use_RS.masked_fill(_mark(kept_RW, self.slots), torch.iinfo(torch.int64).max)
        slot_RS = torch.from_numpy(np.argsort(use_RS.numpy(), axis=1, kind="stable"))
        return slot_RS[row_n, rank_n]

    def _reserve(self, blocks: int) -> None:
        """Makes room in the map, doubling it so that a growing context costs constant time a step."""
        capacity = self._slot_of_block_RN.shape[1] - 1
        if blocks > capacity:
            with torch.inference_mode(False):
                self._slot_of_block_RN = _widen(self._slot_of_block_RN, max(blocks, 2 * capacity) + 1, -1)

    def _check_wanted(self, wanted_RW: Tensor) -> None:
        if wanted_RW.dim() != 2 or wanted_RW.shape[0] != self.rows:
            raise ValueError(f"size mismatch for wanted: expected [{self.rows}, W], got {list(wanted_RW.shape)}")
        if not wanted_RW.numel():
            return
        if (lowest := int(wanted_RW.min())) < -1:
            raise ValueError(f"wanted blocks must be at least -1, got {lowest}")
        if (wishes := int((wanted_RW >= 0).sum(1).max())) > self.slots:
            raise ValueError(f"{wishes} blocks wanted in a row of {self.slots} slots")


def _check_distinct(row_n: Tensor, block_n: Tensor) -> None:
    # Only missing blocks matter: they would be fetched into two slots, of which one would go stale.
    blocks = int(block_n.max()) + 1
    number_n = np.sort((row_n * blocks + block_n).numpy())
    for twice in number_n[1:][number_n[1:] == number_n[:-1]][:1].tolist():
        row, block = divmod(twice, blocks)
        raise ValueError(f"wanted blocks must be distinct in a row: row {row} wants block {block} twice")


def _mark(number_RW: Tensor, count: int) -> Tensor:
    """Bool [R, count], true at the numbers of each row: from 0 to count - 1, or -1, which marks nothing."""
    marked = torch.zeros((number_RW.shape[0], count + 1), dtype=torch.bool)
    return marked.scatter_(1, number_RW + 1, True)[:, 1:]


def _widen(table: Tensor, columns: int, fill: int | bool) -> Tensor:
    wider = table.new_full((table.shape[0], columns), fill)
    wider[:, : table.shape[1]] = table
    return wider
