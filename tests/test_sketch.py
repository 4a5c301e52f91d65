"""KeySketch: codes, error, memory, and any order of operations against a naive model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from attention_predictor.predictor import sketch as sketch_module
from attention_predictor.predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor.quantise import masks, pack, quantise, unpack
from attention_predictor.predictor.sketch import CHUNK_GROUPS, KeySketch

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


def naive(key_BGTD: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Every whole group coded and restored on its own; the tail as it is."""
    whole = key_BGTD.shape[2] // GROUP * GROUP
    parts = []
    for start in range(0, whole, GROUP):
        code, scale, zero = quantise(key_BGTD[:, :, start : start + GROUP], bits)
        restored = zero.float()[:, :, None] + scale.float()[:, :, None] * code.float()
        parts.append(restored.to(dtype))
    return torch.cat([*parts, key_BGTD[:, :, whole:].to(dtype)], dim=2)


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

    @rule(tokens=st.one_of(st.integers(0, 3), st.integers(0, 5 * GROUP)), seed=st.integers(0, 99))
    def extend(self, tokens: int, seed: int) -> None:
        key_BGTD = make_keys(tokens, batch=self.keys.shape[0], seed=seed).to(self.dtype)
        with torch.inference_mode(seed % 2 == 0):  # callers may be in either mode, in any order
            self.sketch.extend(key_BGTD)
        self.keys = torch.cat([self.keys, key_BGTD], dim=2)

    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = int(self.keys.shape[2] * share)
        self.sketch.crop(length, self.keys[:, :, self.sketch.tail_start(length) : length])
        self.keys = self.keys[:, :, :length]

    @rule(share=st.floats(0, 1))
    def crop_within_the_tail(self, share: float) -> None:
        start = self.sketch.tail_start(self.keys.shape[2])
        length = start + int((self.keys.shape[2] - start) * share)
        self.sketch.crop(length)
        self.keys = self.keys[:, :, :length]

    @rule(order=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def index(self, order: list[int]) -> None:
        picked = torch.tensor([i % self.keys.shape[0] for i in order])
        self.sketch.index(picked)
        self.keys = self.keys[picked]

    @rule()
    def copy(self) -> None:
        original, self.sketch = self.sketch, copy.deepcopy(self.sketch)
        original.extend(torch.full((self.keys.shape[0], KV_HEADS, 3 * GROUP, HEAD_DIM), 7.0, dtype=self.dtype))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "sketch"):
            return
        self.sketch.check_integrity()
        assert self.sketch.length == self.keys.shape[2]
        expected_BGTD = naive(self.keys, self.bits, self.dtype)
        torch.testing.assert_close(self.sketch.dequantise(), expected_BGTD)
        query_BHD = torch.randn(self.keys.shape[0], 4, HEAD_DIM, generator=torch.Generator().manual_seed(3))
        logits_BHT = self.sketch.logits(query_BHD, 0.3)
        expected_BGhT = query_BHD.unflatten(1, (KV_HEADS, 2)) @ expected_BGTD.float().transpose(-1, -2) * 0.3
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.15  # the model's keys were rounded to bf16
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
    key_BGTD = make_keys(2048, heads=4, head_dim=64)
    sketch = KeySketch(batch=1, kv_heads=4, head_dim=64, dtype=torch.float32, device="cpu", bits=bits)
    sketch.extend(key_BGTD)
    error_BGTD = sketch.dequantise() - key_BGTD
    assert error_BGTD.square().mean().sqrt() < WORST_ERROR[bits]
    query_BHD = torch.randn(1, 8, 64)
    exact_BGhT = query_BHD.unflatten(1, (4, 2)) @ key_BGTD.transpose(-1, -2) / 8
    error_BGhT = sketch.logits(query_BHD, 1 / 8).unflatten(1, (4, 2)) - exact_BGhT
    assert error_BGhT.square().mean().sqrt() < 1.15 * WORST_ERROR[bits]


def test_the_partial_group_is_exact() -> None:
    sketch, key_BGTD = make_sketch(bits=1, dtype=torch.bfloat16), make_keys(3 * GROUP + 5).bfloat16()
    sketch.extend(key_BGTD)
    assert sketch.tail_start(sketch.length) == 3 * GROUP
    assert torch.equal(sketch.dequantise()[:, :, 3 * GROUP :], key_BGTD[:, :, 3 * GROUP :])


def test_constant_channels_are_exact() -> None:
    key_BGTD = torch.arange(HEAD_DIM).float().expand(1, KV_HEADS, GROUP, -1)
    sketch = make_sketch(bits=1)
    sketch.extend(key_BGTD)
    assert torch.equal(sketch.dequantise(), key_BGTD)


@pytest.mark.parametrize(("bits", "bits_an_element"), [(1, 1.5), (2, 2.5), (4, 4.5), (8, 8.5)])
def test_memory_ratio(bits: int, bits_an_element: float) -> None:
    tokens, head_dim = 32 * 1024, 32
    sketch = KeySketch(batch=1, kv_heads=1, head_dim=head_dim, dtype=torch.bfloat16, device="cpu", bits=bits)
    sketch.extend(torch.zeros(1, 1, tokens, head_dim, dtype=torch.bfloat16))
    tail_bytes = 64 * head_dim * 2
    assert sketch.nbytes == tokens * head_dim * bits_an_element / 8 + tail_bytes
    before = sketch.nbytes
    sketch.extend(torch.zeros(1, 1, 64, head_dim, dtype=torch.bfloat16))
    assert sketch.nbytes - before == CHUNK_GROUPS * 64 * head_dim * bits_an_element / 8


def test_transients_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def watched(packed_JD: Tensor, mask_P11: Tensor) -> Tensor:
        codes = unpack(packed_JD, mask_P11)
        sizes.append(codes.numel())
        return codes

    monkeypatch.setattr(sketch_module, "unpack", watched)
    monkeypatch.setitem(sketch_module.SCRATCH_ELEMENTS, "cpu", 5 * KV_HEADS * GROUP * HEAD_DIM)
    sketch, key_BGTD = make_sketch(), make_keys(23 * GROUP)
    sketch.extend(key_BGTD)
    torch.testing.assert_close(sketch.dequantise(), naive(key_BGTD, 2, torch.float32))
    query_BHD = torch.randn(1, 4, HEAD_DIM)
    expected = query_BHD.unflatten(1, (KV_HEADS, 2)) @ sketch.dequantise().transpose(-1, -2)
    torch.testing.assert_close(sketch.logits(query_BHD, 1.0), expected.flatten(1, 2), atol=1e-4, rtol=1e-4)
    assert max(sizes) == sketch_module.SCRATCH_ELEMENTS["cpu"]


def test_softcap_and_low_precision_queries() -> None:
    sketch, key_BGTD = make_sketch(), make_keys(2 * GROUP + 3)
    sketch.extend(key_BGTD)
    query_BHD = torch.randn(1, 4, HEAD_DIM).bfloat16()
    plain_BHT = sketch.logits(query_BHD, 0.5)
    assert plain_BHT.dtype == torch.float32
    torch.testing.assert_close(sketch.logits(query_BHD, 0.5, softcap=3.0), 3 * torch.tanh(plain_BHT / 3))


def test_wrong_use_is_refused() -> None:
    for wrong in ({"bits": 3}, {"bits": 16}, {"group": 12}, {"group": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            KeySketch(batch=1, kv_heads=1, head_dim=8, dtype=torch.float32, device="cpu", **wrong)
    sketch = make_sketch()
    sketch.extend(make_keys(2 * GROUP + 3))
    with pytest.raises(ValueError, match=r"key_BGTD has shape \[2, 2, 3, 8\], expected \[1, 2, -1, 8\]"):
        sketch.extend(make_keys(3, batch=2))
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
    sketch.extend(make_keys(2 * GROUP + 3))
    for name in ("_scale_BGKD", "_zero_BGKD", "_tail_BGTD"):
        damaged = copy.deepcopy(sketch)
        getattr(damaged, name)[0, 0, 1, 0] = torch.nan
        with pytest.raises(IntegrityError):
            damaged.check_integrity()
    sketch.length = 17 * GROUP
    with pytest.raises(IntegrityError, match="has room for"):
        sketch.check_integrity()
