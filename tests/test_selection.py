"""The block arithmetic of a budget, for any lengths, paddings and scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_predictor.offload.blocks.selection import NEVER, Selection, best_blocks, less_than


@st.composite
def cases(draw):
    block_size = draw(st.sampled_from([4, 16]))
    sink, recent = (block_size * draw(st.integers(0, 3)) for _ in range(2))
    budget = sink + recent + block_size + draw(st.integers(0, 6 * block_size))
    length = draw(st.integers(1, 40 * block_size))
    padding = draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2))
    seed = draw(st.integers(0, 100))
    return Selection(budget, block_size, sink, recent), length, torch.tensor(padding), seed


@settings(max_examples=150, deadline=None)
@given(case=cases(), with_scores=st.booleans())
def test_wanted(case, with_scores):
    selection, length, padding_B, seed = case
    size, n_blocks = selection.block_size, selection.n_blocks(length)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, max(n_blocks - 1, 0), generator=generator) if with_scores else None
    wanted = selection.wanted(scores, length, padding_B, 3)
    assert wanted.shape[-1] <= selection.slots(length)
    for sequence in range(2):
        first = int(padding_B[sequence]) // size
        for head in range(3):
            blocks = wanted[sequence, head][wanted[sequence, head] >= 0].tolist()
            assert len(set(blocks)) == len(blocks)
            assert all(first <= block < n_blocks for block in blocks)
            if length <= selection.budget:
                assert set(blocks) == set(range(first, n_blocks))
                continue
            assert len(blocks) * size <= selection.budget
            # The newest token's block, and those of the last `recent` tokens.
            always = {n_blocks - 1} | {token // size for token in range(length - selection.recent, length)}
            always |= set(range(first, first + selection.sink // size))
            always = {block for block in always if first <= block < n_blocks}
            if len(always) <= selection.budget // size:
                assert always <= set(blocks)
            if not with_scores:
                assert set(blocks) <= always
                continue
            chosen = [block for block in blocks if block not in always]
            left = [b for b in range(first, n_blocks - 1) if b not in blocks]
            if chosen and left:
                row = scores[sequence, head]
                assert min(row[chosen]) >= max(row[left])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), late=st.integers(0, 12), n_blocks=st.integers(1, 12))
def test_within_reach_never_allows_more_late_blocks(seed, late, n_blocks):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 2, n_blocks, generator=generator)
    resident = torch.rand(1, 2, n_blocks, generator=generator) < 0.5
    reach = Selection(64, 16, 16, 16).within_reach(scores, resident, late)
    assert torch.equal(reach[resident], scores[resident])
    absent = (reach > NEVER) & ~resident
    assert int(absent.sum(-1).max()) <= late
    for head in range(2):
        allowed, ruled_out = absent[0, head], ~resident[0, head] & ~absent[0, head]
        if allowed.any() and ruled_out.any():
            assert scores[0, head][allowed].min() >= scores[0, head][ruled_out].max()
        assert int(allowed.sum()) == min(late, int((~resident[0, head]).sum()))


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


def test_equal_scores_choose_the_lowest_blocks():
    selection, padding = Selection(budget=160, block_size=16, sink=32, recent=32), torch.zeros(1, dtype=torch.int64)
    wanted = selection.wanted(torch.zeros(1, 1, 6000), 6000 * 16, padding, 1)
    assert wanted[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5998, 5999]
    reach = selection.within_reach(torch.zeros(1, 1, 6000), torch.zeros(1, 1, 6000, dtype=torch.bool), 3)
    assert (reach > NEVER).nonzero()[:, 2].tolist() == [0, 1, 2]


def test_what_is_kept_of_budgets_by_head_is_bounded():
    for budget in range(500):
        less_than(1000, (budget, 1000), torch.device("cpu"))
    assert less_than.cache_info().currsize <= 64
