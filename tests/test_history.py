"""ScoreHistory against a naive model that keeps one state per sequence and starts over in Python."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from capturable import Capturable
from histories import predicted
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from attention_predictor.errors import IntegrityError
from attention_predictor.predictor.history import CHUNK_BLOCKS, ScoreHistory, row_of_logits
from attention_predictor.predictor.model import (
    ARCHITECTURES,
    AttentionPredictor,
    FilterPredictor,
    architecture,
    new_history,
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

    @rule(more=st.integers(0, 2), seed=st.integers(0, 99))
    @precondition(lambda self: hasattr(self, "history"))
    @torch.no_grad()
    def step(self, more: int, seed: int) -> None:
        """As decoding does: room first, then the host's count, then the row over all of the room."""
        n_blocks = max(1, self.n_blocks + more)
        row_BGN = make_rows(1, n_blocks, batch=self.batch, seed=seed)[:, :, 0]
        self.history.reserve(n_blocks)
        self.history.advance(n_blocks)
        with torch.inference_mode(seed % 2 == 0):
            self.history.observe_row(F.pad(row_BGN, (0, self.history.capacity - n_blocks)))
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
        scores_BGN = predicted(self.history, first, last)
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
    torch.testing.assert_close(predicted(chunked, 0, 30), predicted(whole, 0, 30), atol=1e-5, rtol=1e-4)
    if sum(chunks) == 64:
        once = make_history(predictor)
        once.start(rows_BGRN)
        torch.testing.assert_close(predicted(chunked, 0, 30), predicted(once, 0, 30), atol=1e-5, rtol=1e-4)


# Steps whose length the device alone knows


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_nothing_comes_of_nothing(name: str) -> None:
    """A score of zero leaves a state of zeros: spare capacity may be observed with the rest."""
    predictor = architecture(name)()
    state_BGNC = predictor.start(torch.zeros(1, 1, 5, 7))
    assert not state_BGNC.any()
    for _ in range(3):
        state_BGNC = predictor.observe(state_BGNC, torch.zeros(1, 1, 7))
        assert not state_BGNC.any()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 5), (0, 30), (7, 30), (4, 26), (11, 14)])
@torch.no_grad()
def test_candidates_see_no_other_blocks(name: str, first: int, last: int) -> None:
    """Scores under a mask are those of the candidates' states alone; another sequence has other candidates."""
    torch.manual_seed(0)
    predictor = architecture(name)()
    state_BGNC = predictor.start(make_rows(70, 30, batch=2))
    candidate_BN = torch.zeros(2, 30, dtype=torch.bool)
    candidate_BN[0, first:last] = True
    candidate_BN[1, 2:9] = True
    found = predictor(state_BGNC, candidate_BN)
    for sequence, part in enumerate((slice(first, last), slice(2, 9))):
        alone = predictor(state_BGNC[sequence : sequence + 1, :, part])[0]
        torch.testing.assert_close(found[sequence, :, part], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("estimated", [True, False])
@torch.no_grad()
def test_sequences_of_unlike_length_and_padding(name: str, estimated: bool) -> None:
    """A batch is its sequences one by one: the row of their slots, and the next step's scores."""
    torch.manual_seed(1)
    predictor, generator = architecture(name)(), torch.Generator().manual_seed(1)
    length_B, padding_B, capacity = torch.tensor([470, 200, 33]), torch.tensor([0, 100, 16]), 40
    together = new_history(predictor, batch=3, kv_heads=KV_HEADS, device="cpu")
    n_blocks_B = -(-length_B // 16)
    rows_BGRN = make_rows(5, 30, batch=3) * (torch.arange(30) < n_blocks_B[:, None, None, None])
    together.start(rows_BGRN)
    together.reserve(100)
    peak_BHC = torch.randn(3, 2 * KV_HEADS, capacity, generator=generator)  # of blocks that have not begun as well
    block_BGS = torch.stack([torch.randperm(3, generator=generator) for _ in range(3 * KV_HEADS)]).view(3, KV_HEADS, 3)
    block_BGS[..., 1] = -1
    slot_peak_BHS = torch.randn(3, 2 * KV_HEADS, 3, generator=generator)
    total_BH, rest_BH = torch.full((3, 2 * KV_HEADS), 3.0), torch.full((3, 2 * KV_HEADS), 2.0)
    given = peak_BHC if estimated else None
    together.observe_slots(given, block_BGS, slot_peak_BHS, total_BH, length_B, rest_BH)
    together.check_integrity()
    found = together.predict_ahead(2, 32, length_B, padding_B, capacity)
    for b in range(3):
        one, n = slice(b, b + 1), int(n_blocks_B[b])
        alone = ScoreHistory(predictor, batch=1, kv_heads=KV_HEADS, device="cpu")
        alone.start(rows_BGRN[one, ..., :n])
        total = torch.logaddexp(total_BH, rest_BH)[one]
        logits = (None if given is None else given[one, :, :n], block_BGS[one], slot_peak_BHS[one], total)
        alone.push(row_of_logits(*logits, n))
        torch.testing.assert_close(together.state_BGNC[one, :, :64], alone.state_BGNC)
        first, last = int(padding_B[b]) // 16 + 2, (int(length_B[b]) + 1 - 32) // 16
        expected = torch.full((1, KV_HEADS, capacity), -torch.inf)
        if first < last:
            expected[..., first:last] = predictor(alone.state_BGNC[:, :, first:last])
        torch.testing.assert_close(found[one], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_step_never_asks_the_host(name: str) -> None:
    """The same operations at two lengths within one capacity, in the same memory."""
    history = new_history(architecture(name)(), batch=2, kv_heads=KV_HEADS, device="cpu")
    history.start(make_rows(5, 30, batch=2))
    state_BGNC, records = history.state_BGNC, []
    block_BGS = torch.arange(4).repeat(2, KV_HEADS, 1)
    logits = (torch.randn(2, KV_HEADS, 50), block_BGS, torch.randn(2, KV_HEADS, 4), torch.full((2, KV_HEADS), 4.0))

    def step() -> None:
        history.observe_slots(*logits, length_B, logits[-1])
        history.observe_row(row_BGC)
        history.predict_ahead(2, 32, length_B, padding_B, 50)

    for tokens in (480, 511, 513):
        length_B, padding_B = torch.tensor([tokens, tokens - 4]), torch.tensor([0, tokens // 5])
        history.advance(-(-tokens // 16))
        row_BGC = F.pad(torch.rand(2, KV_HEADS, history.n_blocks), (0, history.capacity - history.n_blocks))
        with Capturable() as capturable:
            step()
        records.append(capturable.record)
        history.check_integrity()
    assert records[0] == records[1] == records[2]
    assert history.state_BGNC is state_BGNC


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@torch.inference_mode()
def test_a_captured_step(name: str, kernels: bool) -> None:
    """One CUDA graph, replayed at other lengths than it was captured at, leaves what steps one by one leave."""
    torch.manual_seed(0)
    history = new_history(architecture(name)().cuda(), batch=2, kv_heads=KV_HEADS, device="cuda", kernels=kernels)
    history.start(make_rows(5, 30, batch=2).cuda())
    by_steps = copy.deepcopy(history)
    length_B, padding_B = torch.tensor([480, 480], device="cuda"), torch.tensor([0, 70], device="cuda")
    row_BGC, total_BH = torch.zeros(2, KV_HEADS, 64, device="cuda"), torch.full((2, KV_HEADS), 4.0, device="cuda")
    block_BGS = torch.arange(4, device="cuda").repeat(2, KV_HEADS, 1)
    logits = (torch.randn(2, KV_HEADS, 50, device="cuda"), block_BGS, torch.randn(2, KV_HEADS, 4, device="cuda"))

    def step(one: ScoreHistory) -> Tensor:
        one.observe_slots(*logits, total_BH, length_B, total_BH)
        one.observe_row(row_BGC)
        return one.predict_ahead(2, 32, length_B, padding_B, 50)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # libraries are loaded before
        step(copy.deepcopy(history))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        score_BGC = step(history)
    for tokens in (480, 481, 496, 497, 560):
        length_B.copy_(torch.tensor([tokens, tokens - 100]))
        n_blocks = -(-tokens // 16)
        row_BGC[..., : n_blocks - 7].uniform_()  # both sequences have as many
        logits[0].normal_()
        for one in (history, by_steps):
            one.advance(n_blocks)
        graph.replay()
        expected = step(by_steps)
        assert torch.equal(score_BGC.isfinite(), expected.isfinite())
        torch.testing.assert_close(score_BGC, expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(history.state_BGNC, by_steps.state_BGNC, atol=1e-4, rtol=1e-3)
        history.check_integrity()


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
    assert not predicted(history, 0, 5).requires_grad


def test_wrong_use_is_refused() -> None:
    history = make_history(FilterPredictor())
    history.start(make_rows(3, 5))
    with pytest.raises(ValueError, match=r"row_BGN must have 3 dimensions, start with \(1, 2\) and cover at least 5"):
        history.push(make_rows(1, 4)[:, :, 0])
    with pytest.raises(ValueError, match="rows_BGRN"):
        history.extend(make_rows(2, 5, batch=2))
    with pytest.raises(ValueError, match=r"row_BGC must have 3 dimensions, start with \(1, 2\) and cover at least 64"):
        history.observe_row(make_rows(1, 63)[:, :, 0])
    length_B = torch.tensor([80])
    with pytest.raises(ValueError, match=r"capacity must lie within 0\.\.64, got 65"):
        history.predict_ahead(0, 1, length_B, None, 65)
    with pytest.raises(ValueError, match="predict_ahead needs a history that has started"):
        make_history(FilterPredictor()).predict_ahead(0, 1, length_B, None, 1)
    for n_blocks in (4, 65):
        with pytest.raises(ValueError, match=rf"n_blocks must lie within 5\.\.64, got {n_blocks}"):
            history.advance(n_blocks)
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
