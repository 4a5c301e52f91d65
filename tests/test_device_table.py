"""DeviceTable against Selection and ResidencyTable: the same scores leave the same blocks, equal to the stored ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from attention_predictor.offload.blocks.tiers import Tiers
from attention_predictor.offload.step.device_table import DeviceTable
from emulated import emulated_gpu
from torch import Tensor

from attention_predictor import OffloadConfig
from attention_predictor.csrc import ops
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.prefetch import make_prefetcher
from attention_predictor.offload.blocks.residency import ResidencyTable
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.stats import DeviceCounts, Stats

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
B, G, H, D = 2, 2, 4, 8
CAPACITY = 64


def kernels(kind: str) -> AbstractContextManager[None]:
    """Tensors on the CPU mean the emulated GPU."""
    return nullcontext() if kind == "cuda" else emulated_gpu()


class Twin:
    """The same tokens in two sets of tiers: one is kept by the host, one by the device's table."""

    def __init__(self, device: str, config: OffloadConfig, length: int, capacity: int = CAPACITY) -> None:
        self.device, self.config = torch.device(device), config
        self.selection, self.capacity = Selection.of(config), capacity
        self.padding_B = torch.tensor([0, 21], device=device)
        self.generator = torch.Generator().manual_seed(length)
        memory = HostMemory(self.device if device == "cuda" else None)
        runtime = SimpleNamespace(
            config=config, prefetcher=make_prefetcher("none", device), stats=Stats(), memory=memory
        )
        shape = {"batch": B, "kv_heads": G, "head_dim": D, "dtype": torch.float32, "device": self.device}
        self.by_host, other = Tiers(runtime, 0, **shape), Tiers(runtime, 0, **shape)
        keys, values = self.random(2, B, G, length, D)
        wanted_BGW = self.selection.wanted(self.random(B, G, capacity), length + 1, self.padding_B, G)
        for tiers in (self.by_host, other):
            tiers.append(keys, values)
            tiers.grow(self.selection.most_slots)
            tiers.fetch_ahead(wanted_BGW)
            tiers.settle()
        self.store, self.pool = other.store, other.pool
        self.store.reserve(capacity * 16)
        self.table = self.device_table(other.table, length)
        self.host_table = other.table
        self.length_1 = torch.tensor([length], device=device)
        self.spent_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def device_table(self, table: ResidencyTable, length: int) -> DeviceTable:
        counts = DeviceCounts(self.device, 1).of_layer(0, 1)
        return DeviceTable(
            table, self.selection, self.store, self.pool, capacity=self.capacity, length=length, counts=counts
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def append(self) -> int:
        key, value = self.random(2, B, G, 1, D)
        self.by_host.append(key, value)
        self.length_1 += 1
        self.store.advance(1)
        with kernels(self.device.type):
            self.table.append(key[:, :, 0].contiguous(), value[:, :, 0].contiguous(), self.length_1)
        return self.by_host.length

    def check(self) -> None:
        """Both hold and attend to the same blocks, wherever they are, and these equal their blocks in the store."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        of_host = self.by_host.table
        host_active = of_host.block_of_slot_RS.masked_fill(~of_host.active_RS, -1)
        for mine, others in ((self.table.block_BGS, of_host.block_of_slot_RS), (self.table.active_BGS, host_active)):
            assert torch.equal(mine.flatten(0, 1).sort(-1).values.cpu(), others.sort(-1).values)
        self.table.leave(self.host_table)
        self.host_table.check_integrity()
        assert int(self.table.counts[4]) == 0
        assert torch.equal(self.store.read(0, self.store.length)[0], self.by_host.store.read(0, self.store.length)[0])
        assert torch.equal(self.store.read(0, self.store.length)[1], self.by_host.store.read(0, self.store.length)[1])
        self.store.check_integrity()
        row_n, slot_n = (self.host_table.block_of_slot_RS >= 0).nonzero(as_tuple=True)
        for row, slot in zip(row_n.tolist(), slot_n.tolist(), strict=True):
            begin = 16 * int(self.host_table.block_of_slot_RS[row, slot])
            end = min(begin + 16, self.store.length)
            if begin >= end:
                continue
            for side, pool in zip(
                self.store.read(begin, end), (self.pool.key_BGSTD, self.pool.value_BGSTD), strict=True
            ):
                assert torch.equal(side.flatten(0, 1)[row], pool.flatten(0, 1)[row, slot, : end - begin].cpu())


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("length", "late", "reserve"),
    [(70, 0.25, 0.5), (125, 0.25, 0.5), (500, 0.25, 0.5), (499, 0.0, 0.5), (300, 1.0, 0.0)],
)
def test_the_same_blocks(kind: str, length: int, late: float, reserve: float) -> None:
    config = OffloadConfig(budget=144, sink=32, recent=32, late_fetch=late, reserve=reserve, kernels="none")
    twin = Twin("cpu" if kind == "emulated" else kind, config, length)
    selection, padding = twin.selection, twin.padding_B
    late_blocks = selection.share(late)
    for step in range(8):
        tokens = twin.append()
        blocks = selection.n_blocks(tokens)
        # As the policy does: sums of the sketch, exact ones where blocks are resident; shares rank the blocks.
        sums, exact = 3 * twin.random(B, H, CAPACITY), 3 * twin.random(B, H, CAPACITY)
        resident_BGN = twin.by_host.table.resident(blocks).view(B, G, -1).to(twin.device)
        known = torch.where(resident_BGN.repeat_interleave(H // G, 1), exact[..., :blocks], sums[..., :blocks])
        known = known.masked_fill(
            torch.arange(blocks, device=twin.device) < (padding // 16)[:, None, None], float("-inf")
        )
        sums[..., :blocks] = sums[..., :blocks].masked_fill(known == float("-inf"), float("-inf"))
        share = torch.softmax(known.double(), -1).view(B, G, H // G, -1).mean(2).float()
        scores = selection.within_reach(share, resident_BGN, late_blocks)
        wanted = selection.wanted(scores, tokens, padding, G)
        slots = twin.table.block_BGS.repeat_interleave(H // G, 1)
        slot_sums = known.gather(-1, slots.clamp(0, blocks - 1)).contiguous()
        with kernels(kind):
            rest = twin.table.choose(
                sums + 1, sums, (slot_sums + 1, slot_sums), late_blocks, twin.length_1, padding, twin.spent_1
            )
        twin.by_host.fetch_late(wanted)
        twin.check()
        attended = twin.by_host.table.active_blocks(blocks).view(B, G, -1).to(twin.device)
        left = known.masked_fill(attended.repeat_interleave(H // G, 1), float("-inf")).double().logsumexp(-1)
        torch.testing.assert_close(
            rest.double().exp(), left.exp(), atol=1e-5 * float(known.exp().sum(-1).max()), rtol=1e-3
        )

        predicted = twin.random(B, G, CAPACITY).masked_fill(twin.random(B, G, CAPACITY) > 1, float("-inf"))
        wanted = selection.wanted(predicted[..., :blocks], tokens + 1, padding, G, selection.ahead_blocks)
        with kernels(kind):
            twin.table.choose_ahead(predicted, selection.ahead_blocks, twin.length_1, padding)
        twin.by_host.fetch_ahead(wanted)
        twin.by_host.settle()
        twin.check()
        if step == 4:  # to the host's table and back
            twin.table = twin.device_table(twin.host_table, tokens)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("length", [500, 21000])  # the latter: more equal scores than are compared each with each
def test_equal_scores_go_by_block(kind: str, length: int) -> None:
    config = OffloadConfig(budget=144, sink=32, recent=32, reserve=0.0, kernels="none")
    twin = Twin("cpu" if kind == "emulated" else kind, config, length, capacity=length // 16 + 4)
    twin.padding_B.zero_()
    scores = torch.zeros(B, G, twin.capacity, device=twin.device)
    scores[..., 20] = 1
    with kernels(kind):
        twin.table.choose_ahead(scores, 0, twin.length_1, twin.padding_B)
    # Sink 0 and 1, recent the last (its window reaches into a block more), and the best of what is between.
    recent = list(range((length + 1 - 32) // 16, (length + 16) // 16))
    between = [*range(2, 8 - len(recent)), 20]
    assert twin.table.active_BGS[0, 0].sort().values.tolist() == [0, 1, *between, *recent]


def slot_table(slots: int, capacity: int) -> ops.SlotTable:
    def full(shape: tuple[int, ...], dtype: torch.dtype = torch.int32, value: int = 0) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    of_slots = [full((1, slots), torch.int64, -1) for _ in range(3)]
    moves = (full((1, slots)), full((1, slots)), full((1,)))
    return ops.SlotTable(*of_slots, full((1, capacity), value=-1), *moves, full((1, capacity)))


@pytest.mark.parametrize("capacity", [600, 20000])
def test_the_most_slots_are_known_beforehand(capacity: int) -> None:
    scores, count_2 = torch.rand(1, 1, capacity), torch.zeros(2, dtype=torch.int64)
    length_1, padding_B = torch.tensor([16 * capacity - 20]), torch.zeros(1, dtype=torch.int64)
    with emulated_gpu():
        most = ops.most_slots(torch.device("cpu"), capacity)
        limits = ops.Limits(length_1, padding_B, None, 16, 16 * most, 2, 32)
        table = slot_table(most, capacity)
        ops.choose_ahead(table, limits, scores, count_2)
        assert count_2.tolist() == [most, most]
        with pytest.raises(ValueError, match=f"{most + 1} slots for {capacity} blocks, expected at most {most}"):
            ops.choose_ahead(slot_table(most + 1, capacity), limits, scores, count_2)
        with pytest.raises(ValueError, match=r"use_RS: expected torch.int64 \[1, \d+\] on cpu"):
            ops.choose_ahead(table._replace(use_RS=table.use_RS.int()), limits, scores, count_2)
        with pytest.raises(ValueError, match="block_size is 24, expected a power of two"):
            ops.choose_ahead(table, limits._replace(block_size=24), scores, count_2)
