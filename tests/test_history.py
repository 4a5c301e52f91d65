"""ScoreHistory against a naive model that keeps one state per sequence and starts over in Python."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from attention_predictor.errors import IntegrityError
from attention_predictor.predictor.history import CHUNK_BLOCKS, ScoreHistory
from attention_predictor.predictor.model import (
    ARCHITECTURES,
    AttentionPredictor,
    FilterPredictor,
    architecture,
)

KV_HEADS = 2
PREDICTORS = {name: cls() for name, cls in ARCHITECTURES.items()}


def make_history(predictor: AttentionPredictor, batch: int = 1) -> ScoreHistory:
    return ScoreHistory(predictor, batch=batch, kv_heads=KV_HEADS, device="cpu")


def make_rows(rows: int, n_blocks: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, KV_HEADS, rows, n_blocks, generator=generator) ** 4


class HistoryMachine(RuleBasedStateMachine):
    """Any order of what a cache does to a history; the model is a plain state of exactly n_blocks."""

    @rule(name=st.sampled_from(sorted(PREDICTORS)), batch=st.integers(1, 2))
    @precondition(lambda self: not hasattr(self, "history"))
    def make(self, name: str, batch: int) -> None:
        self.predictor = PREDICTORS[name]
        self.history = make_history(self.predictor, batch)
        self.state: Tensor | None = None
        self.batch = batch

    def grown(self, n_blocks: int) -> Tensor:
        assert self.state is not None
        padded = self.state.new_zeros(self.batch, KV_HEADS, n_blocks, self.predictor.channels)
        padded[:, :, : self.state.shape[2]] = self.state
        return padded

    def take(self, rows_BGRN: Tensor) -> None:
        if self.state is None or rows_BGRN.shape[2] >= self.predictor.rows:
            self.state = self.predictor.start(rows_BGRN)
            return
        for row_BGN in rows_BGRN.unbind(2):
            self.state = self.predictor.observe(self.grown(row_BGN.shape[-1]), row_BGN)

    @property
    def n_blocks(self) -> int:
        return 0 if self.state is None else self.state.shape[2]

    @rule(rows=st.integers(1, 70), n_blocks=st.integers(1, 80), seed=st.integers(0, 99))
    @precondition(lambda self: hasattr(self, "history"))
    @torch.no_grad()
    def start(self, rows: int, n_blocks: int, seed: int) -> None:
        rows_BGRN = make_rows(rows, n_blocks, batch=self.batch, seed=seed)
        self.history.start(rows_BGRN)
        self.state = self.predictor.start(rows_BGRN)

    @rule(rows=st.integers(0, 66), more=st.integers(0, 70), seed=st.integers(0, 99))
    @precondition(lambda self: hasattr(self, "history"))
    @torch.no_grad()
    def extend(self, rows: int, more: int, seed: int) -> None:
        n_blocks = max(1, self.n_blocks + more)
        rows_BGRN = make_rows(rows, n_blocks, batch=self.batch, seed=seed)
        self.history.extend(rows_BGRN)
        if rows:
            self.take(rows_BGRN)

    @rule(more=st.integers(0, 2), seed=st.integers(0, 99))
    @precondition(lambda self: hasattr(self, "history"))
    @torch.no_grad()
    def push(self, more: int, seed: int) -> None:
        row_BGN = make_rows(1, max(1, self.n_blocks + more), batch=self.batch, seed=seed)[:, :, 0]
        with torch.inference_mode(seed % 2 == 0):  # callers may be in either mode, in any order
            self.history.push(row_BGN)
        self.take(row_BGN[:, :, None])

    @rule(n_blocks=st.integers(0, 200))
    @precondition(lambda self: hasattr(self, "history"))
    def reserve(self, n_blocks: int) -> None:
        self.history.reserve(n_blocks)
        assert self.history.state_BGNC.shape[2] >= n_blocks

    @rule(share=st.floats(0, 1))
    @precondition(lambda self: hasattr(self, "history") and self.state is not None)
    def crop(self, share: float) -> None:
        assert self.state is not None
        kept = int(self.n_blocks * share)
        self.history.crop(kept)
        self.state = self.state[:, :, :kept].clone() if kept else None

    @rule(order=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    @precondition(lambda self: hasattr(self, "history"))
    def index(self, order: list[int]) -> None:
        picked = torch.tensor([i % self.batch for i in order])
        self.history.index(picked)
        self.batch = len(order)
        if self.state is not None:
            self.state = self.state[picked].clone()

    @rule()
    @precondition(lambda self: hasattr(self, "history"))
    def copy(self) -> None:
        original, self.history = self.history, copy.deepcopy(self.history)
        assert self.history.predictor is original.predictor
        if original.n_blocks:
            original.push(torch.ones(self.batch, KV_HEADS, original.n_blocks))
            original.crop(0)

    @invariant()
    @torch.no_grad()
    def agrees(self) -> None:
        if not hasattr(self, "history"):
            return
        self.history.check_integrity()
        assert self.history.started == (self.state is not None)
        assert self.history.n_blocks == self.n_blocks
        if self.state is None:
            return
        first, last = self.n_blocks // 4, self.n_blocks - self.n_blocks // 4
        scores_BGN = self.history.predict(first, last)
        assert scores_BGN.shape == (self.batch, KV_HEADS, self.n_blocks)
        assert scores_BGN.dtype == torch.float32
        expected = self.predictor(self.state[:, :, first:last])
        torch.testing.assert_close(scores_BGN[..., first:last], expected, atol=1e-5, rtol=1e-4)
        assert (scores_BGN[..., :first] == -torch.inf).all()
        assert (scores_BGN[..., last:] == -torch.inf).all()


HistoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestHistory = HistoryMachine.TestCase


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("chunks", [[64], [20, 44], [1, 2, 61], [30, 100, 5], [90, 64]])
def test_prompt_rows_in_chunks_are_the_prompt_rows(name: str, chunks: list[int]) -> None:
    predictor = architecture(name)()
    rows_BGRN = make_rows(sum(chunks), 30)
    whole, chunked = make_history(predictor), make_history(predictor)
    for part_BGRN in rows_BGRN.split(chunks, dim=2):
        chunked.extend(part_BGRN)
    # A chunk as long as the window forgets what came before it; what follows it does not.
    restart = max((i for i, size in enumerate(chunks) if size >= predictor.rows), default=0)
    kept = sum(chunks[restart:]) if predictor.rows > 1 else 1
    whole.start(rows_BGRN[:, :, -kept:][:, :, : chunks[restart]])
    for row_BGN in rows_BGRN[:, :, -kept:][:, :, chunks[restart] :].unbind(2):
        whole.push(row_BGN)
    torch.testing.assert_close(chunked.predict(0, 30), whole.predict(0, 30), atol=1e-5, rtol=1e-4)
    if sum(chunks) == 64:
        once = make_history(predictor)
        once.start(rows_BGRN)
        torch.testing.assert_close(chunked.predict(0, 30), once.predict(0, 30), atol=1e-5, rtol=1e-4)


def test_memory_grows_in_chunks() -> None:
    history = make_history(FilterPredictor())
    a_chunk = KV_HEADS * CHUNK_BLOCKS * FilterPredictor.channels * 4
    history.start(make_rows(3, CHUNK_BLOCKS))
    assert history.nbytes == a_chunk
    history.push(make_rows(1, CHUNK_BLOCKS + 1)[:, :, 0])
    assert history.nbytes == 2 * a_chunk


def test_room_that_was_reserved_is_kept() -> None:
    history, other = make_history(FilterPredictor()), make_history(FilterPredictor())
    for one in (history, other):
        one.start(make_rows(3, 50))
    history.reserve(200)
    state_BGNC = history.state_BGNC
    for more in range(20):
        row_BGN = make_rows(1, 50 + 7 * more, seed=more)[:, :, 0]
        history.push(row_BGN)
        other.push(row_BGN)
    assert history.state_BGNC is state_BGNC
    assert torch.equal(history.state_BGNC[:, :, :192], other.state_BGNC)
    history.check_integrity()


def test_training_weights_leave_no_graph_behind() -> None:
    history = make_history(FilterPredictor())  # its parameters require gradients
    history.start(make_rows(3, 5))
    history.push(make_rows(1, 5)[:, :, 0])
    assert not history.predict(0, 5).requires_grad


def test_wrong_use_is_refused() -> None:
    history = make_history(FilterPredictor())
    history.start(make_rows(3, 5))
    with pytest.raises(ValueError, match=r"row_BGN must have 3 dimensions, start with \(1, 2\) and cover at least 5"):
        history.push(make_rows(1, 4)[:, :, 0])
    with pytest.raises(ValueError, match="rows_BGRN"):
        history.extend(make_rows(2, 5, batch=2))
    with pytest.raises(ValueError, match=r"blocks 0\.\.6 must lie within 0\.\.5"):
        history.predict(0, 6)
    with pytest.raises(ValueError, match="n_blocks"):
        history.crop(6)


def test_integrity_check_finds_damage() -> None:
    history = make_history(FilterPredictor())
    history.start(make_rows(3, 5))
    history._state_BGNC[0, 0, 9, 0] = 1.0
    with pytest.raises(IntegrityError, match="beyond its 5"):
        history.check_integrity()
    history.start(make_rows(3, 5))
    history._state_BGNC[0, 0, 9] = 0.0
    history.push(torch.full((1, KV_HEADS, 5), torch.nan))
    with pytest.raises(IntegrityError, match="NaN"):
        history.check_integrity()
    history.n_blocks = 100
    with pytest.raises(IntegrityError, match="100 blocks in room for 64"):
        history.check_integrity()
