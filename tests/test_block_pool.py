"""BlockPool and ResidencyTable together, and the pool's own errors.

Letters: B sequences, G KV heads, R rows = B·G, N blocks, S slots, W wanted blocks, T tokens, D head size.
"""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.residency import ResidencyTable

KV_HEADS, BLOCK_SIZE, HEAD_DIM, BLOCKS = 2, 4, 3, 12


def pool_of(batch: int = 2, slots: int = 5, dtype: torch.dtype = torch.float32) -> BlockPool:
    return BlockPool(
        batch=batch,
        kv_heads=KV_HEADS,
        slots=slots,
        block_size=BLOCK_SIZE,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device="cpu",
    )


class PoolMachine(RuleBasedStateMachine):
    """Whatever was wanted, cropped or reordered: each resident block's slot holds that block's data."""

    @initialize(slots=st.integers(1, 6))
    def start(self, slots):
        self.data_RN2TD = torch.randn(2 * KV_HEADS, BLOCKS, 2, BLOCK_SIZE, HEAD_DIM)
        self.pool = pool_of(slots=slots)
        self.table = ResidencyTable(rows=2 * KV_HEADS, slots=slots)
        self.last_use: list[dict[int, int]] = [{} for _ in range(2 * KV_HEADS)]
        self.step = 0

    @rule(data=st.data(), inference=st.booleans())
    def want(self, data, inference):
        before = [{b for b in row if b >= 0} for row in self.table.block_of_slot_RS.tolist()]
        most = min(self.pool.slots, BLOCKS)
        wish = st.lists(st.integers(0, BLOCKS - 1), unique=True, max_size=most)
        wanted = data.draw(st.lists(wish, min_size=self.table.rows, max_size=self.table.rows))
        width = max(len(row) for row in wanted) + data.draw(st.integers(0, 2))
        wanted_RW = torch.tensor([row + [-1] * (width - len(row)) for row in wanted]).reshape(len(wanted), width)
        with torch.inference_mode(inference):
            plan = self.table.plan(wanted_RW)
            again = self.table.plan(wanted_RW)
            assert torch.equal(plan.slot_n, again.slot_n), "planning changes nothing"
            self.pool.write_blocks(plan.row_n, plan.slot_n, self.data_RN2TD[plan.row_n, plan.block_n])
            self.table.commit(plan)
        self.step += 1
        for row, wishes in enumerate(wanted):
            mine = plan.row_n == row
            assert sorted(plan.block_n[mine].tolist()) == sorted(set(wishes) - before[row])
            victims = [block for block in plan.victim_n[mine].tolist() if block >= 0]
            fetches = int(mine.sum())
            assert len(victims) == max(fetches - (self.pool.slots - len(before[row])), 0), "empty slots first"
            assert not set(victims) & set(wishes)
            unwanted = sorted(self.last_use[row][block] for block in before[row] - set(wishes))
            assert sorted(self.last_use[row][block] for block in victims) == unwanted[: len(victims)]
            for block in victims:
                del self.last_use[row][block]
            self.last_use[row].update(dict.fromkeys(wishes, self.step))
        active = [set(row[row >= 0].tolist()) for row in self.active_blocks()]
        assert active == [set(wishes) for wishes in wanted]

    @rule(block=st.integers(0, BLOCKS))
    def crop(self, block):
        self.table.drop_from(block)
        self.last_use = [{b: use for b, use in row.items() if b < block} for row in self.last_use]

    @rule(more=st.integers(0, 2))
    def grow(self, more):
        slots = min(self.pool.slots + more, BLOCKS + 1)
        slots = max(slots, self.pool.slots)
        self.pool.grow(slots)
        self.table.grow(slots)

    @rule(data=st.data())
    def index(self, data):
        batch = self.table.rows // KV_HEADS
        picks = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
        self.pool.index(torch.tensor(picks))
        self.table.index(torch.tensor(picks), KV_HEADS)
        rows = [pick * KV_HEADS + head for pick in picks for head in range(KV_HEADS)]
        self.data_RN2TD = self.data_RN2TD[rows]
        self.last_use = [dict(self.last_use[row]) for row in rows]

    @rule(data=st.data())
    def write_token(self, data):
        resident_RN = self.table.resident(BLOCKS)
        shared = [block for block in range(BLOCKS) if bool(resident_RN[:, block].all())]
        if not shared:
            return
        block, offset = data.draw(st.sampled_from(shared)), data.draw(st.integers(0, BLOCK_SIZE - 1))
        kv_2R1D = torch.randn(2, self.table.rows, 1, HEAD_DIM)
        self.data_RN2TD[:, block, :, offset] = kv_2R1D[:, :, 0].transpose(0, 1)
        slot_R = self.table.slot_of(torch.full((self.table.rows,), block))
        self.pool.write_token(slot_R, offset, *kv_2R1D.unflatten(1, (-1, KV_HEADS)))

    @invariant()
    def every_resident_block_is_its_own_data(self):
        if not hasattr(self, "table"):
            return
        self.table.check_integrity()
        self.pool.check_integrity()
        key_RSTD, value_RSTD = self.pool.key_BGSTD.flatten(0, 1), self.pool.value_BGSTD.flatten(0, 1)
        row_n, slot_n = (self.table.block_of_slot_RS >= 0).nonzero(as_tuple=True)
        block_n = self.table.block_of_slot_RS[row_n, slot_n]
        assert torch.equal(key_RSTD[row_n, slot_n], self.data_RN2TD[row_n, block_n, 0])
        assert torch.equal(value_RSTD[row_n, slot_n], self.data_RN2TD[row_n, block_n, 1])
        mask_RN = torch.zeros(self.table.rows, BLOCKS, dtype=torch.bool)
        mask_RN[row_n, block_n] = True
        for n_blocks in (0, 5, BLOCKS):
            assert torch.equal(self.table.resident(n_blocks), mask_RN[:, :n_blocks])
        assert torch.equal(self.table.resident(BLOCKS + 3).sum(1), mask_RN.sum(1))

    def active_blocks(self) -> list[torch.Tensor]:
        block_RS = self.table.block_of_slot_RS.masked_fill(~self.table.active_RS, -1)
        mask_RN = torch.zeros(self.table.rows, BLOCKS + 1, dtype=torch.bool).scatter_(1, block_RS % (BLOCKS + 1), True)
        assert torch.equal(self.table.active_blocks(BLOCKS), mask_RN[:, :BLOCKS])
        return list(block_RS)


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_attention_can_view_all_slots_as_tokens():
    pool = pool_of()
    assert pool.slots == 5
    assert pool.key_BGSTD.view(2, KV_HEADS, 5 * BLOCK_SIZE, HEAD_DIM).data_ptr() == pool.key_BGSTD.data_ptr()
    assert pool.nbytes == 2 * 2 * KV_HEADS * 5 * BLOCK_SIZE * HEAD_DIM * 4


def test_grow_keeps_contents_and_adds_zeros():
    pool = pool_of()
    pool.key_BGSTD.normal_()
    before = pool.key_BGSTD.clone()
    pool.grow(7)
    assert torch.equal(pool.key_BGSTD[:, :, :5], before)
    assert not pool.key_BGSTD[:, :, 5:].any()
    pool.check_integrity()
    with pytest.raises(ValueError, match="slots must be at least 7, got 6"):
        pool.grow(6)


def test_a_pool_of_no_slots_grows():
    pool = pool_of(slots=0)
    pool.write_blocks(torch.tensor([]).long(), torch.tensor([]).long(), torch.zeros(0, 2, BLOCK_SIZE, HEAD_DIM))
    pool.grow(2)
    pool.write_blocks(torch.tensor([3]), torch.tensor([1]), torch.ones(1, 2, BLOCK_SIZE, HEAD_DIM))
    assert pool.value_BGSTD.sum() == BLOCK_SIZE * HEAD_DIM
    assert bool((pool.value_BGSTD[1, 1, 1] == 1).all())


def test_index_repeats_sequences():
    pool = pool_of()
    pool.value_BGSTD.normal_()
    before = pool.value_BGSTD.clone()
    pool.index(torch.tensor([1, 1, 0]))
    assert torch.equal(pool.value_BGSTD, before[[1, 1, 0]])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 2, 4, 3), torch.float64), ((1, 2, 4, 3), torch.float32), ((2, 1, 4, 3), torch.float32)],
)
def test_write_blocks_names_a_wrong_size(shape, dtype):
    with pytest.raises(ValueError, match=r"size mismatch for kv: expected torch.float32 \[2, 2, 4, 3\], got"):
        pool_of().write_blocks(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(("row", "slot"), [(0, -1), (0, 5), (4, 0), (-1, 0)])
def test_write_blocks_refuses_a_slot_that_does_not_exist(row, slot):
    pool = pool_of()
    with pytest.raises(IndexError, match="must be between 0 and"):
        pool.write_blocks(torch.tensor([row]), torch.tensor([slot]), torch.ones(1, 2, BLOCK_SIZE, HEAD_DIM))
    assert not pool.key_BGSTD.any()


def test_write_token_refuses_rows_without_a_slot():
    token = torch.ones(2, KV_HEADS, 1, HEAD_DIM)
    with pytest.raises(IndexError, match="slot must be between 0 and 4, got -1 to 3"):
        pool_of().write_token(torch.tensor([0, 3, -1, 2]), 0, token, token)
    with pytest.raises(IndexError, match="offset must be between 0 and 3, got 4"):
        pool_of().write_token(torch.tensor([0, 3, 1, 2]), 4, token, token)
    with pytest.raises(ValueError, match=r"size mismatch for value: expected torch.float32 \[2, 2, 1, 3\]"):
        pool_of().write_token(torch.tensor([0, 3, 1, 2]), 0, token, token[:1])


def test_a_pool_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        pool = pool_of()
        pool.grow(6)
        pool.index(torch.tensor([1, 0]))
    pool.write_blocks(torch.tensor([0]), torch.tensor([5]), torch.ones(1, 2, BLOCK_SIZE, HEAD_DIM))
    assert pool.key_BGSTD.sum() == BLOCK_SIZE * HEAD_DIM


def test_integrity_check_finds():
    pool = pool_of()
    pool.value_BGSTD = pool.value_BGSTD[:, :, :4]
    with pytest.raises(IntegrityError, match=r"shape of keys is .*5, 4, 3.* of values .*4, 4, 3"):
        pool.check_integrity()
    pool = pool_of()
    pool.value_BGSTD = pool.value_BGSTD.transpose(0, 1)
    with pytest.raises(IntegrityError, match="contiguous"):
        pool.check_integrity()
    pool = pool_of()
    pool.value_BGSTD = pool.key_BGSTD
    with pytest.raises(IntegrityError, match="share their memory"):
        pool.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_pool_takes_host_blocks_and_indices_of_any_device():
    pool = BlockPool(batch=1, kv_heads=2, slots=3, block_size=4, head_dim=3, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(2, 2, 4, 3).bfloat16()
    for kv_n2TD in (kv, kv.pin_memory(), kv.cuda()):
        for device in ("cpu", "cuda"):
            pool.key_BGSTD.fill_(math.nan)
            row_n, slot_n = torch.tensor([0, 1], device=device), torch.tensor([2, 0], device=device)
            pool.write_blocks(row_n, slot_n, kv_n2TD)
            assert torch.equal(pool.key_BGSTD[0, [0, 1], [2, 0]].cpu(), kv[:, 0])
            token = torch.randn(1, 2, 1, 3, device="cuda").bfloat16()
            pool.write_token(slot_n, 1, token, token)
            assert torch.equal(pool.value_BGSTD[0, [0, 1], [2, 0], 1], token[0, :, 0])
