"""SlotTable against a model in plain Python, and its kernel against its operations in torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from emulated import emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.csrc.ops import Estimates
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import NEVER, Limits, Selection, less_than
from attention_predictor.offload.blocks.slot_table import SlotTable, best_blocks, chosen_blocks

B, G, H, SIZE = 2, 2, 4, 16
CPU = torch.device("cpu")
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


def kernels(kind: str) -> AbstractContextManager[None]:
    """Tensors on the CPU mean the emulated GPU."""
    return nullcontext() if kind == "cuda" else emulated_gpu()


def extent_of(length: list[int], padding: list[int] | None = None, device: object = "cpu") -> Extent:
    padding_B = None if padding is None else torch.tensor(padding, device=device)
    return Extent(torch.tensor(length, device=device), padding_B, 64, SIZE)


def best_by_hand(limits: Limits, length: int, padding: int, head: int, row: list[float]) -> set[int]:
    """What a row attends to, as the words of ``chosen_blocks`` have it."""
    n_blocks, first = -(-length // SIZE), padding // SIZE
    limit = limits.heads[head] if limits.heads else limits.tokens
    if length <= limit:
        return set(range(first, n_blocks))
    recent = {token // SIZE for token in range(max(length - max(limits.recent, 1), 0), length)}
    always = {block for block in recent | set(range(first, first + limits.sink_blocks)) if first <= block < n_blocks}
    others = sorted(
        (block for block in range(first, n_blocks) if block not in always and row[block] > NEVER),
        key=lambda block: (-row[block], block),
    )
    return always | set(others[: max(limit // SIZE - len(always), 0)])


@st.composite
def limits_and_lengths(draw):
    sink, recent = draw(st.integers(0, 3)), SIZE * draw(st.integers(0, 3))
    least = sink + recent // SIZE + 1
    heads = tuple(SIZE * (least + draw(st.integers(0, 4))) for _ in range(G)) if draw(st.booleans()) else ()
    tokens = max(heads) if heads else SIZE * (least + draw(st.integers(0, 6)))
    lengths = draw(st.lists(st.integers(1, 500), min_size=B, max_size=B))
    padding = [draw(st.integers(0, length - 1)) for length in lengths]
    return Limits(tokens, heads, sink, recent), lengths, padding, draw(st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(case=limits_and_lengths(), levels=st.sampled_from([2, 1000]))
def test_chosen_blocks(case, levels):
    """Sequences of different lengths and paddings, each as if it were alone."""
    limits, lengths, padding, seed = case
    scores = torch.randint(levels, (B, G, 64), generator=torch.Generator().manual_seed(seed)).float()
    scores[scores == 0] = NEVER
    found = chosen_blocks(limits, extent_of(lengths, padding), scores)
    for b in range(B):
        for g in range(G):
            wanted = best_by_hand(limits, lengths[b], padding[b], g, scores[b, g].tolist())
            assert set(found[b, g].nonzero()[:, 0].tolist()) == wanted


@settings(max_examples=100, deadline=None)
@given(
    blocks=st.integers(1, 60),
    levels=st.integers(1, 4),
    share=st.floats(0, 1),
    never=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_of_equal_blocks_the_lowest_are_the_best(blocks, levels, share, never, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, 3, blocks), generator=generator).float()
    scores[torch.rand(2, 3, blocks, generator=generator) < never] = NEVER
    most = int(share * blocks)
    found = best_blocks(scores, most)
    for row, mask in zip(scores.flatten(0, 1).tolist(), found.flatten(0, 1), strict=True):
        order = sorted((number for number in range(blocks) if row[number] > NEVER), key=lambda n: (-row[n], n))
        assert mask.nonzero()[:, 0].tolist() == sorted(order[:most])


def test_each_head_has_as_many_as_it_may():
    scores = torch.tensor([[[1.0, 1.0, 2.0, 1.0, 0.0]] * 3])
    found = best_blocks(scores, 4, torch.tensor([[1], [3], [4]]))
    assert [row.nonzero()[:, 0].tolist() for row in found[0]] == [[2], [0, 1, 2], [0, 1, 2, 3]]


def test_what_is_kept_of_budgets_by_head_is_bounded():
    for budget in range(500):
        less_than(1000, (budget, 1000), CPU)
    assert less_than.cache_info().currsize <= 64


def test_a_mean_budget_holds_in_layers_that_have_less():
    selection = Selection(96, SIZE, 16, 16, whole=160, heads=(64, 96))
    assert selection.limits(160) == Limits(160, (), 1, 16)
    assert selection.limits(161) == Limits(96, (64, 96), 1, 16)
    assert selection.limits(161, more=2) == Limits(128, (96, 128), 1, 16)


class TableMachine(RuleBasedStateMachine):
    """Whatever was chosen, cropped or reordered: the same blocks as of a table kept by hand, one slot each."""

    @initialize(slots=st.integers(8, 12), length=st.integers(1, 200), seed=st.integers(0, 1000))
    def start(self, slots, length, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.limits = Limits(7 * SIZE, (), 1, SIZE)
        self.slots, self.length, self.batch = slots, length, B
        self.table = SlotTable(rows=B * G, device=CPU)
        self.table.grow(slots)
        self.table.reserve(64)
        self.counts = torch.zeros(5, dtype=torch.int64)
        self.used: list[dict[int, int]] = [{} for _ in range(B * G)]  # of each resident block, when

    def chosen(self, scores: Tensor, ahead: bool) -> list[set[int]]:
        rows, length = scores.flatten(0, 1).tolist(), self.length + ahead
        return [best_by_hand(self.limits, length, 0, 0, row) for row in rows]

    def check(self, wanted: list[set[int]], use: int) -> None:
        begun, moves = -(-self.length // SIZE), [set() for _ in wanted]
        listed = self.table.moves()
        for row, block, slot in zip(*(one.tolist() for one in listed), strict=True):
            moves[row].add(block)
            assert int(self.table.block_RS[row, slot]) == block
        for row, (used, blocks) in enumerate(zip(self.used, wanted, strict=True)):
            absent = blocks - used.keys()
            assert moves[row] == {block for block in absent if block < begun}
            kept = sorted(used.keys() - blocks, key=lambda block: (used[block], block))
            gone = kept[: max(len(used) + len(absent) - self.slots, 0)]
            for block in gone:
                del used[block]
            used.update(dict.fromkeys(blocks, use))
            active_S = self.table.active_RS[row]
            assert sorted(active_S[active_S >= 0].tolist()) == sorted(blocks)

    @rule()
    def choose_ahead(self):
        scores = torch.randn(self.batch, G, 64, generator=self.generator)
        extent = extent_of([self.length] * self.batch)
        wanted = self.chosen(scores.masked_fill(~extent.begun_BC[:, None], NEVER), ahead=True)
        self.table.choose_ahead(self.limits, extent, scores, self.counts, kernel=False)
        self.check(wanted, 2 * self.length + 1)
        self.length = min(self.length + 1, 1000)

    @rule(late=st.integers(0, 8))
    def choose(self, late):
        scores = torch.randn(self.batch, G, 64, generator=self.generator)
        extent = extent_of([self.length] * self.batch)
        within = scores.clone().flatten(0, 1)
        for row, used in enumerate(self.used):
            absent = [block for block in range(-(-self.length // SIZE)) if block not in used]
            reach = sorted(absent, key=lambda block: (-float(within[row, block]), block))[:late]
            allowed = torch.zeros(64, dtype=torch.bool)
            allowed[[*used, *reach]] = True
            within[row, ~allowed] = NEVER
        wanted = self.chosen(within.view_as(scores), ahead=False)
        assert self.table.choose(self.limits, extent, scores, late, self.counts, kernel=False) is None
        self.check(wanted, 2 * self.length)

    @rule(tokens=st.integers(0, 60))
    def crop(self, tokens):
        self.length = max(self.length - tokens, 1)
        n_blocks = -(-self.length // SIZE)
        self.table.drop_from(n_blocks)
        self.used = [{block: use for block, use in row.items() if block < n_blocks} for row in self.used]

    @rule(more=st.integers(0, 2))
    def grow(self, more):
        self.slots += more
        self.table.grow(self.slots)

    @rule(data=st.data())
    def index(self, data):
        picks = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.table.index(torch.tensor(picks), G)
        self.used = [dict(self.used[pick * G + head]) for pick in picks for head in range(G)]
        self.batch = len(picks)

    @invariant()
    def one_slot_each(self):
        if not hasattr(self, "table"):
            return
        self.table.check_integrity()
        for row, used in enumerate(self.used):
            block_S = self.table.block_RS[row]
            assert sorted(block_S[block_S >= 0].tolist()) == sorted(used)


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestTableMachine = TableMachine.TestCase


def test_what_contradicts_itself_is_named():
    table = SlotTable(rows=2, device=CPU)
    table.grow(3)
    table.reserve(8)
    table.block_RS[0, 1] = 5
    with pytest.raises(IntegrityError, match="1 slots are filled, found 0 blocks with a slot"):
        table.check_integrity()
    table.tensors.slot_RC[0, 4] = 1
    with pytest.raises(IntegrityError, match="row 0: slot 1 holds block 5, found under slot -1"):
        table.check_integrity()


class Twins:
    """Two tables that are given the same: one chooses in torch operations, the other by the kernel."""

    def __init__(self, kind: str, limits: Limits, length: list[int], padding: list[int] | None, slots: int) -> None:
        self.kind, self.device = kind, torch.device("cpu" if kind == "emulated" else "cuda:0")
        self.limits, self.length, self.padding = limits, length, padding
        self.generator = torch.Generator().manual_seed(sum(length))
        self.tables = [SlotTable(rows=B * G, device=self.device) for _ in range(2)]
        self.counts = torch.zeros(2, 5, dtype=torch.int64, device=self.device)
        for table in self.tables:
            table.grow(slots)
            table.reserve(64)

    @property
    def extent(self) -> Extent:
        return extent_of(self.length, self.padding, device=self.device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def ahead(self, scores: Tensor | None) -> None:
        for kernel, table in enumerate(self.tables):
            with kernels(self.kind):
                table.choose_ahead(self.limits, self.extent, scores, self.counts[kernel], bool(kernel))
        self.check()

    def by_scores(self, scores: Tensor, late: int) -> None:
        for kernel, table in enumerate(self.tables):
            with kernels(self.kind):
                table.choose(self.limits, self.extent, scores, late, self.counts[kernel], bool(kernel))
        self.check()

    def by_estimates(self, late: int | None) -> None:
        peak, logsum = self.random(B, H, 64), 3 * self.random(B, H, 64)
        slots = self.tables[0].block_RS.shape[1]
        exact = [self.random(B, H, 64) for _ in range(2)]
        found = []
        for kernel, table in enumerate(self.tables):
            block_BHS = table.block_RS.view(B, G, slots).repeat_interleave(H // G, 1).clamp_min(0)
            of_slots = [x.gather(2, block_BHS) for x in exact] if late is not None else [None, None]
            estimates = Estimates(peak.clone(), logsum, *of_slots)
            with kernels(self.kind):
                rest = table.choose(self.limits, self.extent, estimates, late, self.counts[kernel], bool(kernel))
            begun = self.extent.begun_BC[:, None]
            found.append((rest, estimates.peak_BHC.masked_fill(~begun, 0)))
        self.check()
        torch.testing.assert_close(found[1][0].exp(), found[0][0].exp(), atol=1e-4, rtol=1e-3)
        assert torch.equal(found[1][1], found[0][1])

    def check(self) -> None:
        one, other = self.tables
        for mine, its in ((one.block_RS, other.block_RS), (one.active_RS, other.active_RS)):
            assert torch.equal(mine.sort(-1).values, its.sort(-1).values)
        for table in self.tables:
            table.check_integrity()
        assert [sorted(zip(*(x.tolist() for x in one.moves()[:2]), strict=True))] == [
            sorted(zip(*(x.tolist() for x in other.moves()[:2]), strict=True))
        ]
        assert torch.equal(self.counts[0], self.counts[1])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("heads", [(), (80, 112)], ids=["even", "heads"])
@pytest.mark.parametrize(
    ("length", "padding"),
    [([70, 70], None), ([125, 125], [0, 37]), ([500, 90], None), ([499, 300], [21, 250])],
    ids=str,
)
def test_the_kernel_leaves_the_same_blocks(kind: str, heads: tuple[int, ...], length: list[int], padding) -> None:
    twins = Twins(kind, Limits(112, heads, 2, 32), length, padding, slots=11)
    twins.ahead(None)
    for step in range(6):
        twins.length = [tokens + 1 for tokens in twins.length]
        twins.by_estimates([2, 0, 7, None, 1, 2][step])
        twins.ahead(twins.random(B, G, 64))
        twins.by_scores(twins.random(B, G, 64), late=7)
        twins.ahead(torch.zeros(B, G, 64, device=twins.device))  # ties


def test_more_slots_than_the_kernel_holds_are_refused_by_it():
    limits, extent = Limits(112, (), 2, 32), extent_of([500, 500])
    table = SlotTable(rows=B * G, device=CPU)
    with emulated_gpu():
        table.grow(ops.most_slots(CPU, 64) + 1)
        table.reserve(64)
        with pytest.raises(ValueError, match="slots for 64 blocks, expected at most"):
            table.choose_ahead(limits, extent, None, torch.zeros(5, dtype=torch.int64), kernel=True)
        bad = torch.zeros(B, G, 65)
        with pytest.raises(ValueError, match=r"score_BGC: expected torch.float32 \[2, 2, 64\]"):
            table.choose_ahead(limits, extent, bad, torch.zeros(5, dtype=torch.int64), kernel=True)
