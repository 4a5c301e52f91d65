"""SlotTable against a model in plain Python, and its kernel against its operations in torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from capturable import Capturable
from emulated import emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from attention_predictor.csrc import ops, select
from attention_predictor.csrc.ops import Estimates
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import NEVER, Limits, Selection
from attention_predictor.offload.blocks.slot_table import SlotTable, best_blocks, chosen_blocks

B, G, H, SIZE = 2, 2, 4, 16
CPU = torch.device("cpu")
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


def kernels(kind: str) -> AbstractContextManager[None]:
    """Tensors on the CPU mean the emulated GPU."""
    return nullcontext() if kind == "cuda" else emulated_gpu()


def extent_of(
    length: list[int], padding: list[int] | None = None, capacity: int = 64, device: object = "cpu"
) -> Extent:
    padding_B = None if padding is None else torch.tensor(padding, device=device)
    return Extent(torch.tensor(length, device=device), padding_B, capacity, SIZE)


def table_of(slots: int, capacity: int = 64, rows: int = B * G, device: torch.device = CPU) -> SlotTable:
    table = SlotTable(rows=rows, device=device)
    table.grow(slots)
    table.reserve(capacity)
    return table


def best_by_hand(limits: Limits, length: int, padding: int, head: int, row: list[float]) -> set[int]:
    """What a row attends to, as the words of ``chosen_blocks`` have it."""
    n_blocks, first = -(-length // SIZE), padding // SIZE
    limit = limits.heads[head] if limits.heads else limits.tokens
    if length <= limit:
        return set(range(first, n_blocks))
    recent = {token // SIZE for token in range(max(length - max(limits.recent, 1), 0), length)}
    sink = range(padding // SIZE, -(-(padding + limits.sink_blocks * SIZE) // SIZE) if limits.sink_blocks else 0)
    touched = max(len({(at + token) // SIZE for token in range(max(limits.recent, 1))}) for at in range(SIZE))
    if limit // SIZE < limits.sink_blocks + touched + 1:  # no block for the sink's last tokens
        sink = sink[: limits.sink_blocks]
    always = {block for block in recent | set(sink) if first <= block < n_blocks}
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
            assert len(wanted) <= (limits.heads[g] if limits.heads else limits.tokens) // SIZE


@pytest.mark.parametrize("padding", [0, 5, 16, 31])
def test_a_padded_sequence_keeps_its_own_first_tokens(padding):
    """All of the sink's, though they begin within a block; a budget of sink, recent and one block has no room."""
    length, sink, recent = 500, 2 * SIZE, 3 * SIZE
    for blocks, holds in ((7, True), (6, padding % SIZE == 0)):
        limits = Limits(blocks * SIZE, (), 2, recent)
        found = chosen_blocks(limits, extent_of([length, length], [padding, 0]), torch.randn(B, G, 64))
        assert found.sum(-1).max() <= blocks
        own = torch.arange(padding, padding + sink) // SIZE
        assert bool(found[0, :, own].all()) == holds
        assert found[:, :, (length - recent) // SIZE : -(-length // SIZE)].all()


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
    found = best_blocks(scores, 4, torch.tensor([[[1], [3], [4]]]))
    assert [row.nonzero()[:, 0].tolist() for row in found[0]] == [[2], [0, 1, 2], [0, 1, 2, 3]]


def test_a_mean_budget_holds_in_layers_that_have_less():
    selection = Selection(96, SIZE, 16, 16, dense_tokens=160, heads=(64, 96))
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
        self.table = table_of(slots)
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
    table = table_of(3, capacity=8, rows=2)
    table.block_RS[0, 1] = 5
    with pytest.raises(IntegrityError, match="1 slots are filled, found 0 blocks with a slot"):
        table.check_integrity()
    table.tensors.slot_RC[0, 4] = 1
    with pytest.raises(IntegrityError, match="row 0: slot 1 holds block 5, found under slot -1"):
        table.check_integrity()


def test_fewer_slots_are_refused():
    table = table_of(3)
    with pytest.raises(ValueError, match="slots must be at least 3, got 2"):
        table.grow(2)


@pytest.mark.parametrize("slots", [16_385, 40_000])
def test_many_slots(slots: int) -> None:
    """Budgets of hundreds of thousands of tokens: the oldest goes, whatever its slot's number."""
    table, counts = table_of(slots, capacity=slots + 8, rows=1), torch.zeros(5, dtype=torch.int64)
    limits = Limits(SIZE * slots, (), 1, 1)
    scores = torch.rand(1, 1, slots + 8, generator=torch.Generator().manual_seed(0))
    table.choose_ahead(limits, extent_of([SIZE * slots - 1], capacity=slots + 8), scores, counts, kernel=False)
    assert counts.tolist() == [0, 0, slots, slots, 0]
    at = extent_of([SIZE * (slots + 8)], capacity=slots + 8)
    scores[..., 5:12] = 0
    table.choose(limits._replace(tokens=SIZE * (slots - 5)), at, scores, 0, counts, kernel=False)
    table.check_integrity()
    gone, come = table.resident_RC[0].logical_not().nonzero()[:, 0], table.moves()
    # Of equal ones block 5 is chosen; of those that are not, the lowest goes first.
    assert gone.tolist() == [6, *range(slots, slots + 7)]
    assert [x.tolist() for x in come] == [[0], [slots + 7], [6]]


@pytest.mark.parametrize("heads", [(), (80, 112)], ids=["even", "heads"])
def test_the_reference_can_be_captured(heads: tuple[int, ...]) -> None:
    """Nothing is read by the host, no shape depends on a length, and what is kept keeps its memory."""
    limits, records = Limits(112, heads, 2, 32), []
    for length in (200, 700):
        table, counts = table_of(11), torch.zeros(5, dtype=torch.int64)
        table.choose_ahead(limits, extent_of([length, 90]), None, counts, kernel=False)
        places = [tensor.data_ptr() for tensor in table.tensors]
        extent, score_BGC = extent_of([length + 1, 91], [0, 20]), torch.randn(B, G, 64)
        estimates = Estimates(*torch.randn(2, B, H, 64), *torch.randn(2, B, H, 11))
        with Capturable() as capturable:
            table.choose(limits, extent, estimates, 2, counts, kernel=False)
            table.choose(limits, extent, estimates, None, counts, kernel=False)
            table.choose(limits, extent, score_BGC, 7, counts, kernel=False)
            table.choose_ahead(limits, extent, score_BGC, counts, kernel=False)
            table.choose_ahead(limits, extent, None, counts, kernel=False)
        table.check_integrity()
        assert [tensor.data_ptr() for tensor in table.tensors] == places
        records.append(capturable.record)
    assert records[0] == records[1]


def test_limits_by_head_are_made_once() -> None:
    """What a captured step reads must stay where it is, whatever other layers have."""
    table, counts = table_of(11), torch.zeros(5, dtype=torch.int64)
    made = []
    for more in (0, 16, 0):
        limits = Limits(112 + more, (80 + more, 112 + more), 2, 32)
        table.choose_ahead(limits, extent_of([500, 90]), None, counts, kernel=False)
        made.append(table._deficit(limits, extent_of([500, 90])))
    assert made[0] is made[1] is made[2]
    assert made[0].tolist() == [[32, 0]] * 2
    assert table._deficit(Limits(112, (), 2, 32), extent_of([500, 90])) is None


class Twins:
    """Two tables that are given the same: one chooses in torch operations, the other by the kernel."""

    def __init__(
        self,
        kind: str,
        limits: Limits,
        length: list[int],
        padding: list[int] | None = None,
        *,
        slots: int,
        capacity: int = 64,
        heads: int = H,
    ) -> None:
        self.kind, self.device = kind, torch.device("cpu" if kind == "emulated" else "cuda:0")
        self.limits, self.length, self.padding, self.capacity, self.heads = limits, length, padding, capacity, heads
        self.generator = torch.Generator().manual_seed(sum(length))
        self.rows = len(length) * G
        self.tables = [table_of(slots, capacity, self.rows, self.device) for _ in range(2)]
        self.counts = torch.zeros(2, 5, dtype=torch.int64, device=self.device)

    @property
    def extent(self) -> Extent:
        return extent_of(self.length, self.padding, self.capacity, self.device)

    def advance(self) -> None:
        self.length = [tokens + 1 for tokens in self.length]

    def random(self, heads: int, levels: int = 0) -> Tensor:
        """Scores of all blocks: of so many levels, or all different."""
        shape = (len(self.length), heads, self.capacity)
        found = torch.randint(levels, shape, generator=self.generator).float() if levels else None
        return (torch.randn(shape, generator=self.generator) if found is None else found).to(self.device)

    def ahead(self, scores: Tensor | None, unspent: list[int] | None = None) -> None:
        """``unspent``: tokens of the budget, by KV head, that some sequences leave."""
        if unspent is not None:
            of_B1 = torch.randint(2, (len(self.length), 1), generator=self.generator)
            unspent = (of_B1 * torch.tensor(unspent)).to(self.device)
        for kernel, table in enumerate(self.tables):
            with kernels(self.kind):
                table.choose_ahead(self.limits, self.extent, scores, self.counts[kernel], bool(kernel), unspent)
        self.check()

    def by_scores(self, scores: Tensor, late: int) -> None:
        for kernel, table in enumerate(self.tables):
            with kernels(self.kind):
                table.choose(self.limits, self.extent, scores, late, self.counts[kernel], bool(kernel))
        self.check()

    def by_estimates(self, late: int | None, *, exact: bool = True, hidden: float = 0) -> None:
        """``hidden``: the share of blocks whose estimates are ``-inf``, as of padding."""
        peak, logsum = self.random(self.heads), 3 * self.random(self.heads)
        logsum[:, :, torch.rand(self.capacity, generator=self.generator) < hidden] = NEVER
        of_blocks = [self.random(self.heads) for _ in range(2)]
        found = []
        for kernel, table in enumerate(self.tables):
            block_BHS = table.block_RS.unflatten(0, (-1, G)).repeat_interleave(self.heads // G, 1)
            of_slots = [x.gather(2, block_BHS.clamp_min(0)) for x in of_blocks] if exact else [None, None]
            estimates = Estimates(peak.clone(), logsum, *of_slots)
            with kernels(self.kind):
                rest = table.choose(self.limits, self.extent, estimates, late, self.counts[kernel], bool(kernel))
            begun = self.extent.begun_BC[:, None]
            found.append((rest, estimates.peak_BHC.masked_fill(~begun, 0)))
        self.check()
        # The kernel subtracts what is attended to from all there is: it errs by a share of that.
        rest, other = found[0][0].exp(), found[1][0].exp()
        whole = logsum.masked_fill(~begun, NEVER).exp().sum(-1) + 50
        assert bool(((rest - other).abs() <= 2e-5 * whole + 1e-3 * rest).all())
        assert torch.equal(found[1][1], found[0][1])

    def check(self) -> None:
        """Both have chosen, hold and fetch the same blocks; and the counts agree."""
        one, other = self.tables
        for mine, its in ((one.block_RS, other.block_RS), (one.active_RS, other.active_RS)):
            assert torch.equal(mine.sort(-1).values, its.sort(-1).values)
        for table in self.tables:
            table.check_integrity()
        listed = []
        for table in self.tables:
            row_n, block_n, slot_n = table.moves()
            assert torch.equal(table.block_RS.cpu()[row_n, slot_n], block_n)
            listed.append(sorted(zip(row_n.tolist(), block_n.tolist(), strict=True)))
        assert listed[0] == listed[1]
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
        twins.advance()
        twins.by_estimates([2, 0, 7, None, 1, 2][step])
        twins.ahead(twins.random(G))
        twins.by_scores(twins.random(G), late=7)
        twins.ahead(twins.random(G, levels=1))
        twins.ahead(twins.random(G), unspent=[0, 16])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("length", "capacity", "heads", "slots"),
    [
        ([900], 61, H, 11),  # blocks are not read by fours
        ([900, 333], 64, 3 * G, 13),
        ([900], 64, 10 * G, 11),  # more heads than a thread holds numbers of
        ([2100 * SIZE - 3], 2112, 4 * G, 40),
        ([8300 * SIZE], 8320, G, 12),  # more blocks than they hold
        ([6000], 400, G, 300),  # more blocks are wanted than bounds are found for
        ([12000], 760, G, 580),  # more slots than threads
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["BY_ESTIMATES", "BY_ESTIMATES_OF_MANY"])
def test_the_kernel_at_its_bounds(
    kind: str, length: list[int], capacity: int, heads: int, slots: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "estimating", lambda *_: getattr(select, kernel))
    limits = Limits(SIZE * (slots - 4), (), 2, 32)
    twins = Twins(kind, limits, length, slots=slots, capacity=capacity, heads=heads)
    twins.ahead(twins.random(G))
    twins.advance()
    twins.by_estimates(slots // 4)
    twins.by_estimates(None, exact=False)
    twins.ahead(twins.random(G, levels=3))
    twins.advance()
    twins.by_estimates(2, hidden=0.9)
    twins.by_estimates(None)  # what is resident is known, and nothing chosen
    twins.by_scores(twins.random(G, levels=2), late=slots)
    twins.by_scores(twins.random(G, levels=2), late=3)


def test_two_rows_are_chosen_at_once_if_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select.binding, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(select.binding, "max_shared_memory", lambda _: 227 << 10)
    assert select.estimating(CPU, 132, 30 << 10) is select.BY_ESTIMATES
    assert select.estimating(CPU, 133, 30 << 10) is select.BY_ESTIMATES_OF_MANY
    assert select.estimating(CPU, 133, 110 << 10) is select.BY_ESTIMATES


@pytest.mark.parametrize("capacity", [600, 20000])
def test_the_most_slots_are_known_beforehand(capacity: int) -> None:
    """As many are served, with keys in shared memory or without; more are refused."""
    with emulated_gpu():
        most = ops.max_slots(CPU, capacity)
    twins = Twins("emulated", Limits(SIZE * most, (), 2, 32), [SIZE * capacity - 20], slots=most, capacity=capacity)
    twins.ahead(twins.random(G))
    assert twins.counts[1].tolist() == [0, 0, G * most, G * most, 0]
    table, counts = table_of(most + 1, capacity), torch.zeros(5, dtype=torch.int64)
    with (
        emulated_gpu(),
        pytest.raises(ValueError, match=f"{most + 1} slots for {capacity} blocks, expected at most {most}"),
    ):
        table.choose_ahead(twins.limits, twins.extent, None, counts, kernel=True)


def test_arguments_that_do_not_fit_are_refused() -> None:
    limits, extent, counts = Limits(112, (), 2, 32), extent_of([500, 500]), torch.zeros(5, dtype=torch.int64)
    table = table_of(11)
    with emulated_gpu():
        with pytest.raises(ValueError, match=r"score_BGC: expected torch.float32 \[2, 2, 64\]"):
            table.choose_ahead(limits, extent, torch.zeros(B, G, 65), counts, kernel=True)
        with pytest.raises(ValueError, match=r"sum_BHC: expected torch.float32 \[2, 4, 64\]"):
            shorter = Estimates(torch.zeros(B, H, 64), torch.zeros(B, H, 60))
            table.choose(limits, extent, shorter, None, counts, kernel=True)
        with pytest.raises(ValueError, match="slot_sum_BHS is None, expected the exact scores"):
            table.choose(limits, extent, Estimates(*torch.zeros(2, B, H, 64)), 2, counts, kernel=True)
        with pytest.raises(ValueError, match="block_size is 24, expected a power of two"):
            table.choose_ahead(limits, Extent(extent.length_B, None, 64, 24), None, counts, kernel=True)
        table.tensors = table.tensors._replace(use_RS=table.tensors.use_RS.int())
        with pytest.raises(ValueError, match=r"use_RS: expected torch.int64 \[4, 11\] on cpu"):
            table.choose_ahead(limits, extent, None, counts, kernel=True)
