"""ResidencyTable by itself: order of eviction, stale plans, errors. With data behind it: test_block_pool.py.

Letters: R rows, N blocks, S slots, W wanted blocks.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.residency import Plan, ResidencyTable


def want(table: ResidencyTable, *rows: list[int]) -> Plan:
    plan = table.plan(torch.tensor(rows))
    table.commit(plan)
    table.check_integrity()
    return plan


def as_lists(*tensors: Tensor) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def test_missing_blocks_fill_empty_slots_in_order():
    table = ResidencyTable(rows=2, slots=3)
    plan = want(table, [7, -1, 5], [9, 2, 0])
    assert as_lists(plan.row_n, plan.block_n) == [[0, 0, 1, 1, 1], [7, 5, 9, 2, 0]]
    assert as_lists(plan.slot_n, plan.victim_n) == [[0, 1, 0, 1, 2], [-1] * 5]
    assert as_lists(table.block_of_slot_RS, table.active_RS.long()) == [
        [[7, 5, -1], [9, 2, 0]],
        [[1, 1, 0], [1, 1, 1]],
    ]
    assert plan.slot_RW.tolist() == [[0, -1, 1], [0, 1, 2]]


def test_resident_blocks_are_reused_and_the_least_recently_wanted_goes():
    table = ResidencyTable(rows=1, slots=4)
    want(table, [1, 2])
    want(table, [3, 4])
    want(table, [1])
    plan = want(table, [4, 5])
    assert as_lists(plan.block_n, plan.victim_n) == [[5], [2]]
    plan = want(table, [6, 7])
    assert as_lists(plan.block_n, plan.victim_n) == [[6, 7], [3, 1]]


def test_a_wish_keeps_a_block_even_when_it_is_the_oldest():
    table = ResidencyTable(rows=1, slots=2)
    want(table, [1])
    want(table, [2])
    plan = want(table, [3, 1])
    assert as_lists(plan.block_n, plan.victim_n) == [[3], [2]]


def test_planning_changes_nothing_and_is_not_changed_by_its_maker():
    table = ResidencyTable(rows=1, slots=2)
    want(table, [1, 2])
    before = copy.deepcopy(vars(table))
    wanted = torch.tensor([[3000, 2]])
    plan = table.plan(wanted)
    wanted[0, 0] = 9
    for name, value in vars(table).items():
        assert torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
    assert plan.wanted_RW.tolist() == [[3000, 2]]


def test_nothing_wanted_makes_nothing_active():
    table = ResidencyTable(rows=2, slots=2)
    want(table, [1, 2], [3, 4])
    plan = want(table, [-1], [-1])
    assert plan.row_n.numel() == 0
    assert not table.active_RS.any()
    assert table.resident(5).sum() == 4
    assert table.plan(torch.empty(2, 0)).row_n.numel() == 0


def test_slot_of():
    table = ResidencyTable(rows=3, slots=2)
    want(table, [5, 6], [6, -1], [1, 2])
    assert table.slot_of(torch.tensor([6, 6, 6])).tolist() == [1, 0, -1]
    assert table.slot_of(torch.tensor([-1, 700, 2])).tolist() == [-1, -1, 1]


def test_dropped_blocks_are_fetched_again():
    table = ResidencyTable(rows=1, slots=3)
    want(table, [1, 2, 3])
    table.drop_from(2)
    table.check_integrity()
    assert table.active_blocks(4).tolist() == [[False, True, False, False]]
    plan = want(table, [3, 2, 1])
    assert as_lists(plan.block_n, plan.victim_n) == [[3, 2], [-1, -1]]


def test_new_slots_are_used_first():
    table = ResidencyTable(rows=2, slots=0)
    table.grow(1)
    want(table, [1], [2])
    table.grow(2)
    plan = want(table, [3], [2])
    assert as_lists(plan.row_n, plan.slot_n, plan.victim_n) == [[0], [1], [-1]]
    with pytest.raises(ValueError, match="slots must be at least 2, got 1"):
        table.grow(1)


def test_index_carries_recency_along():
    table = ResidencyTable(rows=4, slots=2)
    want(table, *[[10 * row] for row in range(4)])
    want(table, *[[10 * row + 1] for row in range(4)])
    table.index(torch.tensor([1, 1, 0]), kv_heads=2)
    table.check_integrity()
    assert table.block_of_slot_RS[:, 0].tolist() == [20, 30, 20, 30, 0, 10]
    plan = want(table, *[[50]] * 6)
    assert plan.victim_n.tolist() == [20, 30, 20, 30, 0, 10]


def test_more_wishes_than_slots():
    with pytest.raises(ValueError, match="3 blocks wanted in a row of 2 slots"):
        ResidencyTable(rows=2, slots=2).plan(torch.tensor([[1, -1, -1], [1, 2, 3]]))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([[1, 2], [3, 3]], "row 1 wants block 3 twice"),
        ([[1, 2]], r"size mismatch for wanted: expected \[2, W\], got \[1, 2\]"),
        ([1, 2], r"size mismatch for wanted: expected \[2, W\], got \[2\]"),
        ([[1, 2], [3, -2]], "at least -1, got -2"),
    ],
)
def test_bad_wishes(wanted, message):
    with pytest.raises(ValueError, match=message):
        ResidencyTable(rows=2, slots=2).plan(torch.tensor(wanted))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: want(table, [8, 9]),
        lambda table: table.drop_from(2),
        lambda table: table.index(torch.tensor([0]), kv_heads=1),
    ],
)
def test_a_stale_plan_is_refused(change):
    table = ResidencyTable(rows=1, slots=2)
    want(table, [1, 2])
    plan = table.plan(torch.tensor([[2, 3]]))
    change(table)
    before = table.block_of_slot_RS.clone()
    with pytest.raises(IntegrityError, match="the plan is stale"):
        table.commit(plan)
    assert torch.equal(table.block_of_slot_RS, before)
    table.check_integrity()


def test_growing_does_not_make_a_plan_stale():
    table = ResidencyTable(rows=1, slots=2)
    plan = table.plan(torch.tensor([[2, 3]]))
    table.grow(4)
    table.commit(plan)
    table.check_integrity()
    assert table.active_RS.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda table: table.block_of_slot_RS[1].fill_(7),
            "row 1: slot 0 holds block 7, found under slot -1",
        ),
        (
            lambda table: table.block_of_slot_RS[0, 0].fill_(2),
            "row 0: slot 0 holds block 2, found under slot 1",
        ),
        (lambda table: table.block_of_slot_RS[0, 0].fill_(-1), "3 slots are filled, found 4 blocks"),
        (lambda table: table._use_RS.zero_(), "a filled slot was never wanted"),
    ],
)
def test_integrity_check_finds(damage, message):
    table = ResidencyTable(rows=2, slots=2)
    want(table, [1, 2], [3, 4])
    damage(table)
    with pytest.raises(IntegrityError, match=message):
        table.check_integrity()


def test_integrity_check_finds_active_empty_slots():
    table = ResidencyTable(rows=2, slots=2)
    table.active_RS[1, 1] = True
    with pytest.raises(IntegrityError, match="1 empty slots are active"):
        table.check_integrity()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([1, 7, 64]), slots=st.sampled_from([1, 16, 65]))
def test_many_rows_keep_their_integrity(seed, rows, slots):
    torch.manual_seed(seed)
    with torch.inference_mode():
        table = ResidencyTable(rows=rows, slots=slots)
    for n_blocks in (slots, slots + 3, 4 * slots):
        wanted = torch.rand(rows, n_blocks).argsort(1)[:, :slots]
        wanted = wanted.masked_fill(torch.rand(wanted.shape) < 0.2, -1)
        table.commit(table.plan(wanted))
        table.check_integrity()
        mask = torch.zeros(rows, n_blocks + 1, dtype=torch.bool).scatter_(1, wanted % (n_blocks + 1), True)
        assert torch.equal(table.active_blocks(n_blocks), mask[:, :n_blocks])


@pytest.mark.parametrize("slots", [16_384, 16_385, 40_000])
def test_many_slots(slots):
    """Budgets of hundreds of thousands of tokens, or blocks of one: the oldest goes, whatever its slot's number."""
    table = ResidencyTable(rows=1, slots=slots)
    table.commit(table.plan(torch.arange(slots)[None]))
    kept = torch.arange(slots - 5)[None]
    table.commit(table.plan(kept))  # the five last slots were wanted longest ago
    plan = want(table, [*range(slots - 5), slots + 7])
    assert plan.victim_n.tolist() == [slots - 5]
    assert plan.slot_n.tolist() == [slots - 5]
    assert int(table.slot_of(torch.tensor([slots + 7]))) == slots - 5
