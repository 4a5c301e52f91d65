"""KeySketch: codes, error, memory, and any order of operations against a naive model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from attention_predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor import sketch as sketch_module
from attention_predictor.predictor.quantise import masks, pack, quantise, unpack
from attention_predictor.predictor.sketch import CHUNK_GROUPS, RECENT_QUERIES, KeySketch

KV_HEADS, HEAD_DIM, GROUP = 2, 8, 16
# Root mean square error of normal keys relative to their deviation; min/max levels alone make 1.66, .45, .09.
WORST_ERROR = {1: 0.62, 2: 0.35, 4: 0.095, 8: 0.008}


def make_keys(tokens: int, *, batch: int = 1, seed: int = 0, heads: int = KV_HEADS, head_dim: int = HEAD_DIM) -> Tensor:
    """Keys_BGTD with channel means much larger than their spread, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    key_BGTD = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    return key_BGTD + 5 * torch.randn(1, 1, 1, head_dim, generator=torch.Generator().manual_seed(1))


def make_sketch(batch: int = 1, bits: int = 2, dtype: torch.dtype = torch.float32) -> KeySketch:
    return KeySketch(
        batch=batch, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, device="cpu", bits=bits, group=GROUP
    )


def make_queries(queries: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Queries_BHQD whose channels differ in size, otherwise in each head and sequence."""
    generator = torch.Generator().manual_seed(seed)
    size_BH1D = torch.rand(batch, 2 * KV_HEADS, 1, HEAD_DIM, generator=generator)
    return size_BH1D * torch.randn(batch, 2 * KV_HEADS, queries, HEAD_DIM, generator=generator)


def ranked_queries(queries: int, order_D: Tensor) -> Tensor:
    """Queries_BHQD of 8 heads whose channels, in that order, become smaller by a tenth each."""
    size_D = torch.empty(len(order_D)).scatter_(0, order_D, 0.9 ** torch.arange(len(order_D)))
    return size_D * torch.randn(1, 8, queries, len(order_D), generator=torch.Generator().manual_seed(5))


def find_order(key_BGTD: Tensor, square_BGD: Tensor) -> Tensor:
    """Channels by importance: the squares of their queries times their keys' variance within whole groups."""
    whole = key_BGTD.shape[2] // GROUP * GROUP
    groups = key_BGTD[:, :, :whole].float().split(GROUP, dim=2)
    variance_BGD = torch.stack([group.var(2, correction=0) for group in groups]).sum(0)
    return (square_BGD * variance_BGD).argsort(dim=-1, descending=True, stable=True)


def naive(key_BGTD: Tensor, bits: int, dtype: torch.dtype, order_BGD: Tensor) -> Tensor:
    """Every whole group coded and restored on its own; the tail as it is."""
    whole, quarter = key_BGTD.shape[2] // GROUP * GROUP, HEAD_DIM // 4 if bits < 8 else 0
    widths = [(2 * bits, quarter), (bits, HEAD_DIM - 2 * quarter), (0, quarter)]
    back_BGTD = order_BGD.argsort(-1)[:, :, None].expand(-1, -1, GROUP, -1)
    parts = []
    for start in range(0, whole, GROUP):
        ranked_BGTD = key_BGTD[:, :, start : start + GROUP].gather(-1, order_BGD[:, :, None].expand_as(back_BGTD))
        # Apart by width, as sums over tensors of another shape may add in another order and round otherwise.
        by_width = ranked_BGTD.split([channels for _, channels in widths], -1)
        coded = [restored(key, width) for key, (width, _) in zip(by_width, widths, strict=True) if key.numel()]
        parts.append(torch.cat(coded, -1).gather(-1, back_BGTD).to(dtype))
    return torch.cat([*parts, key_BGTD[:, :, whole:].to(dtype)], dim=2)


def restored(key_BGTD: Tensor, bits: int) -> Tensor:
    if bits == 0:
        return key_BGTD.float().contiguous().mean(2, keepdim=True).half().float().expand_as(key_BGTD)
    code, scale, zero = quantise(key_BGTD, bits)
    return zero.float()[:, :, None] + scale.float()[:, :, None] * code.float()


class SketchMachine(RuleBasedStateMachine):
    """Any order of what a cache does to a sketch; the model keeps all exact keys."""

    @initialize(
        bits=st.sampled_from([1, 2, 4, 8]),
        batch=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def make(self, bits: int, batch: int, dtype: torch.dtype) -> None:
        self.bits, self.dtype = bits, dtype
        self.sketch = make_sketch(batch, bits, dtype)
        self.keys = make_keys(0, batch=batch).to(dtype)
        self.squares = torch.zeros(batch, KV_HEADS, HEAD_DIM)
        self.order = torch.arange(HEAD_DIM).repeat(batch, KV_HEADS, 1)

    @rule(tokens=st.one_of(st.integers(0, 3), st.integers(0, 5 * GROUP)), seed=st.integers(0, 99))
    def extend(self, tokens: int, seed: int) -> None:
        batch, length = self.keys.shape[0], self.keys.shape[2]
        key_BGTD = make_keys(tokens, batch=batch, seed=seed).to(self.dtype)
        query_BHQD = make_queries(tokens, batch=batch, seed=seed).to(self.dtype)
        with torch.inference_mode(seed % 2 == 0):  # callers may be in either mode, in any order
            self.sketch.extend(key_BGTD, query_BHQD)
        self.keys = torch.cat([self.keys, key_BGTD], dim=2)
        if length < GROUP:
            recent_BGhQD = query_BHQD[:, :, -RECENT_QUERIES:].float().unflatten(1, (KV_HEADS, -1))
            self.squares = self.squares + recent_BGhQD.square().sum((2, 3))
            if self.keys.shape[2] >= GROUP:
                self.order = find_order(self.keys, self.squares)

    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = int(self.keys.shape[2] * share)
        self.sketch.crop(length, self.keys[:, :, self.sketch.tail_start(length) : length])
        self._cropped(length)

    @rule(share=st.floats(0, 1))
    def crop_within_the_tail(self, share: float) -> None:
        start = self.sketch.tail_start(self.keys.shape[2])
        length = start + int((self.keys.shape[2] - start) * share)
        self.sketch.crop(length)
        self._cropped(length)

    def _cropped(self, length: int) -> None:
        self.keys = self.keys[:, :, :length]
        if length == 0:
            self.squares = torch.zeros_like(self.squares)

    @rule(order=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def index(self, order: list[int]) -> None:
        picked = torch.tensor([i % self.keys.shape[0] for i in order])
        self.sketch.index(picked)
        self.keys, self.squares, self.order = self.keys[picked], self.squares[picked], self.order[picked]

    @rule()
    def copy(self) -> None:
        original, self.sketch = self.sketch, copy.deepcopy(self.sketch)
        key_BGTD = torch.full((self.keys.shape[0], KV_HEADS, 3 * GROUP, HEAD_DIM), 7.0, dtype=self.dtype)
        original.extend(key_BGTD, make_queries(3 * GROUP, batch=self.keys.shape[0]))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "sketch"):
            return
        self.sketch.check_integrity()
        assert self.sketch.length == self.keys.shape[2]
        expected_BGTD = naive(self.keys, self.bits, self.dtype, self.order)
        key_BGTD = self.sketch.dequantise()
        torch.testing.assert_close(key_BGTD, expected_BGTD)
        query_BHD = torch.randn(self.keys.shape[0], 4, HEAD_DIM, generator=torch.Generator().manual_seed(3))
        logits_BHT = self.sketch.logits(query_BHD, 0.3)
        expected_BGhT = query_BHD.unflatten(1, (KV_HEADS, 2)) @ key_BGTD.float().transpose(-1, -2) * 0.3
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.15  # `dequantise` rounded the keys to bf16
        torch.testing.assert_close(logits_BHT, expected_BGhT.flatten(1, 2), atol=tolerance, rtol=1e-3)


SketchMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestSketch = SketchMachine.TestCase


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_round_trip(bits: int) -> None:
    code_TD = torch.randint(0, 2**bits, (3, 16, 5), dtype=torch.uint8)
    packed_JD = pack(code_TD, bits)
    assert packed_JD.shape == (3, 2 * bits, 5)
    mask_P11, factor_P = masks(bits, "cpu")
    shifted_PJD = unpack(packed_JD, mask_P11).unflatten(-2, (8 // bits, -1))
    assert torch.equal((shifted_PJD * factor_P[:, None, None]).flatten(-3, -2), code_TD.float())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=16, max_size=16),
    scale=st.sampled_from([0.0, 1e-38, 1e-8, 1e-3, 1.0]),
)
def test_codes_of_any_finite_keys_are_valid(bits: int, values: list[float], scale: float) -> None:
    key_TD = torch.tensor(values)[:, None] * scale
    code, scale_D, zero_D = quantise(key_TD, bits)
    assert torch.isfinite(scale_D).all()
    assert torch.isfinite(zero_D).all()
    assert (scale_D >= 0).all()
    assert code.max() <= 2**bits - 1
    inside = key_TD.clamp(-65504, 65504)
    restored = zero_D.float() + scale_D.float() * code.float()
    spread = (inside.max() - inside.min()).item()
    assert (restored - inside).abs().max() <= spread + 1e-3 * inside.abs().max() + 1e-7


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_error_bound(bits: int) -> None:
    """Each channel has the error of its width; without codes, the keys' own deviation."""
    key_BGTD = make_keys(2048, heads=4, head_dim=64)
    order_D = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    sketch = KeySketch(batch=1, kv_heads=4, head_dim=64, dtype=torch.float32, device="cpu", bits=bits)
    sketch.extend(key_BGTD, ranked_queries(64, order_D))
    error_BGTD = (sketch.dequantise() - key_BGTD)[..., order_D]
    tiers = [(WORST_ERROR[8], 0, 64)]
    if bits < 8:  # neighbours in the order may have changed places, so those beside a border are left out
        tiers = [(WORST_ERROR[2 * bits], 0, 12), (WORST_ERROR[bits], 20, 44), (1.02, 52, 64)]
    for worst, first, last in tiers:
        assert error_BGTD[..., first:last].square().mean().sqrt() < worst


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_channels_of_unlike_importance_gain(bits: int) -> None:
    """Logits are much nearer to the truth than with as many bits for every channel, prefilled at once or in pieces."""
    key_BGTD = make_keys(2048, heads=4, head_dim=64)
    query_BHQD = ranked_queries(2048, torch.randperm(64, generator=torch.Generator().manual_seed(2)))
    last_BGhD = query_BHQD[:, :, -1].unflatten(1, (4, 2))
    code_BGKTD, scale_BGKD, zero_BGKD = quantise(key_BGTD.unflatten(2, (-1, 64)), bits)
    uniform_BGTD = (zero_BGKD.float()[..., None, :] + scale_BGKD.float()[..., None, :] * code_BGKTD).flatten(2, 3)
    uniform_error_BGhT = last_BGhD @ (uniform_BGTD - key_BGTD).transpose(-1, -2)
    for pieces in ([2048], [500, 1548], [*[1] * 70, 1978]):
        sketch = KeySketch(batch=1, kv_heads=4, head_dim=64, dtype=torch.float32, device="cpu", bits=bits)
        for key, query in zip(key_BGTD.split(pieces, 2), query_BHQD.split(pieces, 2), strict=True):
            sketch.extend(key, query)
        logits_BGhT = sketch.logits(query_BHQD[:, :, -1], 1.0).unflatten(1, (4, 2))
        error_BGhT = logits_BGhT - last_BGhD @ key_BGTD.transpose(-1, -2)
        assert error_BGhT.square().mean() < 0.5 * uniform_error_BGhT.square().mean()


def test_the_order_of_channels() -> None:
    """It follows each sequence's last queries, stays, and is found anew once no whole group is left."""
    rising_D = 4.0 ** torch.arange(HEAD_DIM)
    size_BHQD = torch.stack([rising_D, rising_D.flip(0)])[:, None, None].expand(2, 2 * KV_HEADS, 64, HEAD_DIM)
    key_BGTD, sketch = make_keys(3 * GROUP, batch=2), make_sketch(batch=2)

    def orders() -> list[list[int]]:
        sketch.check_integrity()
        assert torch.equal(sketch._order_BGD[:, 0], sketch._order_BGD[:, 1])
        return sketch._order_BGD[:, 0].tolist()

    up, down = list(range(HEAD_DIM)), list(reversed(range(HEAD_DIM)))
    sketch.extend(key_BGTD[:, :, :3], torch.cat([1e6 * size_BHQD.flip(-1), size_BHQD], 2))  # 64 are read
    sketch.extend(key_BGTD[:, :, 3:], size_BHQD)
    assert orders() == [down, up]
    sketch.crop(GROUP + 3, key_BGTD[:, :, GROUP : GROUP + 3])
    sketch.extend(key_BGTD, 1e6 * size_BHQD.flip(-1))
    assert orders() == [down, up]
    sketch.index(torch.tensor([1, 1, 0]))
    assert orders() == [up, up, down]
    sketch.crop(3, key_BGTD[[1, 1, 0], :, :3])
    sketch.extend(key_BGTD[[1, 1, 0]], 1e6 * size_BHQD[[0, 0, 1]])
    assert orders() == [down, down, up]
    sketch.crop(0)  # forgets those large queries, too
    sketch.extend(key_BGTD[[1, 1, 0]], size_BHQD[[1, 1, 0]])
    assert orders() == [up, up, down]


def test_the_partial_group_is_exact() -> None:
    sketch, key_BGTD = make_sketch(bits=1, dtype=torch.bfloat16), make_keys(3 * GROUP + 5).bfloat16()
    sketch.extend(key_BGTD, make_queries(3 * GROUP + 5))
    assert sketch.tail_start(sketch.length) == 3 * GROUP
    assert torch.equal(sketch.dequantise()[:, :, 3 * GROUP :], key_BGTD[:, :, 3 * GROUP :])


def test_constant_channels_are_exact() -> None:
    key_BGTD = torch.arange(HEAD_DIM).float().expand(1, KV_HEADS, GROUP, -1)
    sketch = make_sketch(bits=1)
    sketch.extend(key_BGTD, make_queries(GROUP))
    assert torch.equal(sketch.dequantise(), key_BGTD)


@pytest.mark.parametrize(("bits", "bits_an_element"), [(1, 1.4375), (2, 2.4375), (4, 4.4375), (8, 8.5)])
def test_memory_ratio(bits: int, bits_an_element: float) -> None:
    tokens, head_dim = 32 * 1024, 32
    sketch = KeySketch(batch=1, kv_heads=1, head_dim=head_dim, dtype=torch.bfloat16, device="cpu", bits=bits)
    query_BHQD = torch.zeros(1, 2, 64, head_dim)
    sketch.extend(torch.zeros(1, 1, tokens, head_dim, dtype=torch.bfloat16), query_BHQD)
    tail_bytes, order_bytes = 64 * head_dim * 2, head_dim * (4 + 8)
    assert sketch.nbytes == tokens * head_dim * bits_an_element / 8 + tail_bytes + order_bytes
    before = sketch.nbytes
    sketch.extend(torch.zeros(1, 1, 64, head_dim, dtype=torch.bfloat16), query_BHQD)
    assert sketch.nbytes - before == CHUNK_GROUPS * 64 * head_dim * bits_an_element / 8


def test_within_the_capacity_nothing_moves() -> None:
    sketch, tokens = make_sketch(), 3 * GROUP + 5
    assert sketch.capacity == GROUP - 1
    sketch.reserve(tokens)
    held = [getattr(owner, name).data_ptr() for owner, name in sketch._grouped()]
    assert sketch.capacity == (CHUNK_GROUPS + 1) * GROUP - 1
    sketch.extend(make_keys(tokens), make_queries(tokens))
    sketch.extend(make_keys(sketch.capacity - tokens), make_queries(GROUP))
    assert held == [getattr(owner, name).data_ptr() for owner, name in sketch._grouped()]
    sketch.extend(make_keys(1), make_queries(1))
    assert sketch.capacity == (2 * CHUNK_GROUPS + 1) * GROUP - 1


def test_transients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def watched(packed_JD: Tensor, mask_P11: Tensor) -> Tensor:
        codes = unpack(packed_JD, mask_P11)
        sizes.append(codes.numel())
        return codes

    monkeypatch.setattr(sketch_module, "unpack", watched)
    monkeypatch.setitem(sketch_module.SCRATCH_ELEMENTS, "cpu", 5 * KV_HEADS * GROUP * HEAD_DIM // 2)
    sketch, key_BGTD = make_sketch(), make_keys(23 * GROUP)
    sketch.extend(key_BGTD, make_queries(23 * GROUP))
    recent_BGhQD = make_queries(23 * GROUP)[:, :, -RECENT_QUERIES:].unflatten(1, (KV_HEADS, 2))
    order_BGD = find_order(key_BGTD, recent_BGhQD.square().sum((2, 3)))
    torch.testing.assert_close(sketch.dequantise(), naive(key_BGTD, 2, torch.float32, order_BGD))
    query_BHD = torch.randn(1, 4, HEAD_DIM)
    expected = query_BHD.unflatten(1, (KV_HEADS, 2)) @ sketch.dequantise().transpose(-1, -2)
    torch.testing.assert_close(sketch.logits(query_BHD, 1.0), expected.flatten(1, 2), atol=1e-4, rtol=1e-4)
    assert max(sizes) == sketch_module.SCRATCH_ELEMENTS["cpu"]


def test_softcap_and_low_precision_queries() -> None:
    sketch, key_BGTD = make_sketch(), make_keys(2 * GROUP + 3)
    sketch.extend(key_BGTD, make_queries(2 * GROUP + 3))
    query_BHD = torch.randn(1, 4, HEAD_DIM).bfloat16()
    plain_BHT = sketch.logits(query_BHD, 0.5)
    assert plain_BHT.dtype == torch.float32
    torch.testing.assert_close(sketch.logits(query_BHD, 0.5, softcap=3.0), 3 * torch.tanh(plain_BHT / 3))


def test_wrong_use_is_refused() -> None:
    for wrong in ({"bits": 3}, {"bits": 16}, {"group": 12}, {"group": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            KeySketch(batch=1, kv_heads=1, head_dim=8, dtype=torch.float32, device="cpu", **wrong)
    sketch = make_sketch()
    sketch.extend(make_keys(2 * GROUP + 3), make_queries(2 * GROUP + 3))
    with pytest.raises(ValueError, match=r"key_BGTD has shape \[2, 2, 3, 8\], expected \[1, 2, -1, 8\]"):
        sketch.extend(make_keys(3, batch=2), make_queries(3))
    with pytest.raises(ValueError, match="query_BHQD"):
        sketch.extend(make_keys(3), make_queries(3, batch=2))
    with pytest.raises(ValueError, match="query_BHD"):
        sketch.logits(torch.zeros(1, 4, 9), 1.0)
    with pytest.raises(ValueError, match=r"length must lie within 0\.\.35"):
        sketch.crop(36)
    with pytest.raises(ValueError, match="tail_key_BGTD is needed"):
        sketch.crop(GROUP + 1)
    with pytest.raises(ValueError, match="tail_key_BGTD has shape"):
        sketch.crop(GROUP + 1, make_keys(2))


def test_integrity_check_finds_damage() -> None:
    sketch = make_sketch()
    sketch.extend(make_keys(2 * GROUP + 3), make_queries(2 * GROUP + 3))
    for name in ("_scale_BGKR", "_zero_BGKD", "_tail_BGTD"):
        damaged = copy.deepcopy(sketch)
        getattr(damaged, name)[0, 0, 1, 0] = torch.nan
        with pytest.raises(IntegrityError):
            damaged.check_integrity()
    damaged = copy.deepcopy(sketch)
    damaged._order_BGD[0, 1, 0] = damaged._order_BGD[0, 1, 1]
    with pytest.raises(IntegrityError, match="order of channels"):
        damaged.check_integrity()
    sketch.length = 17 * GROUP
    with pytest.raises(IntegrityError, match="has room for"):
        sketch.check_integrity()
