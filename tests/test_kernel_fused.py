"""Kernels for norms, gated MLPs and rotary embeddings, against torch's operations on the same inputs.

Suffixes: B sequences, H query heads, G KV heads, T tokens, D head size, E rotated elements, W elements of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from emulated import emulated_gpu
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.csrc.gate import gate_up_by_torch
from attention_predictor.csrc.norm import rms_norm_by_torch
from attention_predictor.csrc.rotary import rotate_by_torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def assert_within_roundings(found: Tensor, wanted: Tensor, roundings: int, share: float = 1.0) -> None:
    """Off by so many units in the last place at most, and off at all for at most that share of the elements."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    eps, tiny = torch.finfo(wanted.dtype).eps, torch.finfo(wanted.dtype).tiny
    off = (found.double() - wanted.double()).abs()
    assert (off <= roundings * eps * wanted.double().abs() + tiny).all()
    assert (off > 0).double().mean() <= share


class TestNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("form", ops.Form)
    @pytest.mark.parametrize("width", [1, 7, 64, 128, 2560, 2563, 16392])
    def test_as_torch(self, device: str, dtype: torch.dtype, form: ops.Form, width: int) -> None:
        """In half precision the sum's order alone may turn a rounding."""
        x = random(3, 2, width, dtype=dtype, device=device)
        x[1] *= 1e-3  # where eps counts
        weight = random(width, dtype=dtype, device=device, seed=1)
        wanted = rms_norm_by_torch(x, weight, 1e-6, form)
        found = ops.rms_norm(x, weight, 1e-6, form)
        # The torch operations' own error in fp32, which grows with the width, bounds ours.
        assert_within_roundings(
            found, wanted, 16 if dtype == torch.float32 else 2, 1.0 if dtype.itemsize == 4 else 0.01
        )

    def test_rows_anywhere_in_memory(self, device: str) -> None:
        whole, weight = random(4, 6, 65, dtype=torch.float16, device=device), torch.ones(64, device=device).half()
        part = whole[:, ::2, 1:]
        assert_within_roundings(
            ops.rms_norm(part, weight, 1e-6, ops.Form.CAST_FIRST),
            rms_norm_by_torch(part, weight, 1e-6, ops.Form.CAST_FIRST),
            2,
        )
        assert ops.rms_norm(part[:0], weight, 1e-6, ops.Form.CAST_FIRST).shape == (0, 3, 64)

    def test_wrong_arguments_are_named(self, device: str) -> None:
        x = torch.zeros(2, 8, device=device)
        with pytest.raises(ValueError, match=r"weight_W: expected torch.float32 \[8\]"):
            ops.rms_norm(x, x[0].half(), 1e-6, ops.Form.CAST_FIRST)
        with pytest.raises(ValueError, match=r"x_xW is torch.float64, expected one of torch.float32"):
            ops.rms_norm(x.double(), x[0].double(), 1e-6, ops.Form.CAST_FIRST)


class TestGate:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ops.Activation)
    @pytest.mark.parametrize("width", [1, 9, 256, 1000, 5003])
    def test_as_torch(self, device: str, dtype: torch.dtype, activation: ops.Activation, width: int) -> None:
        gate, up = (6 * random(3, width, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
        wanted, found = gate_up_by_torch(gate, up, activation), ops.gate_up(gate, up, activation)
        if dtype == torch.float32:  # 1 + tanh cancels where the gate is negative
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=2e-6)
        elif activation == ops.Activation.SILU:
            assert_within_roundings(found, wanted, 2, 0.001)
        else:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=2 * torch.finfo(dtype).eps)
            assert (found != wanted)[gate > 0].sum() <= 0.01 * gate.numel()  # 1 + tanh cancels below

    def test_infinities_and_halves_of_one_tensor(self, device: str) -> None:
        both = random(2, 1, 2 * 24, dtype=torch.bfloat16, device=device)
        both[0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
        gate, up = both.chunk(2, -1)
        assert not gate.is_contiguous()
        wanted = gate_up_by_torch(gate, up, ops.Activation.SILU)
        assert torch.equal(ops.gate_up(gate, up, ops.Activation.SILU).nan_to_num(), wanted.nan_to_num())
        wanted = gate_up_by_torch(gate[..., 1:], up[..., :-1], ops.Activation.SILU)  # not at multiples of 16 bytes
        found = ops.gate_up(gate[..., 1:], up[..., :-1], ops.Activation.SILU)
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())

    def test_wrong_arguments_are_named(self, device: str) -> None:
        x = torch.zeros(2, 8, device=device)
        with pytest.raises(ValueError, match=r"up_xW: expected torch.float32 \[2, 8\]"):
            ops.gate_up(x, x[:1], ops.Activation.SILU)


class TestRotary:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("B", "H", "G", "T", "D", "E"),
        [(1, 32, 8, 1, 128, 128), (3, 4, 2, 1, 64, 32), (2, 3, 1, 5, 80, 20), (2, 2, 2, 2, 10, 6), (1, 1, 1, 1, 2, 2)],
    )
    @pytest.mark.parametrize("shared", [True, False])
    def test_equals_torch(
        self, device: str, dtype: torch.dtype, B: int, H: int, G: int, T: int, D: int, E: int, shared: bool
    ) -> None:
        """Bit for bit; queries and keys are parts of one tensor, with tokens before heads."""
        both = random(B, T, (H + G) * D, dtype=dtype, device=device)
        query, key = (x.view(B, T, -1, D).transpose(1, 2) for x in both.split([H * D, G * D], -1))
        cosine, sine = (
            random(1 if shared else B, T, E, dtype=dtype, device=device, seed=seed).clamp(-1, 1) for seed in (1, 2)
        )
        for found, wanted in zip(
            ops.rotate(query, key, cosine, sine), rotate_by_torch(query, key, cosine, sine), strict=True
        ):
            assert torch.equal(found, wanted)
            assert found.is_contiguous()

    def test_what_does_not_go_together_is_refused(self, device: str) -> None:
        query, angle = torch.zeros(2, 4, 1, 8, device=device), torch.zeros(1, 1, 8, device=device)
        key = query[:, :2]
        assert ops.rotates(query, key, angle, angle)
        for others in (
            (query, key[:1], angle, angle),
            (query, key, angle.half(), angle),
            (query, key, angle[..., :3], angle[..., :3]),
            (query, key, angle.expand(3, -1, -1), angle.expand(3, -1, -1)),
            (query, key, angle.repeat(1, 1, 2), angle.repeat(1, 1, 2)),
            (query[0], key[0], angle, angle),
        ):
            assert not ops.rotates(*others)
            with pytest.raises(ValueError, match=r"expected \[B, H, T, D\]"):
                ops.rotate(*others)


def test_there_are_none_for_cpus() -> None:
    x = torch.zeros(1, 1, 1, 8)
    for call in (
        lambda: ops.rms_norm(x, x[0, 0, 0], 1e-6, ops.Form.CAST_FIRST),
        lambda: ops.gate_up(x, x, ops.Activation.SILU),
        lambda: ops.rotate(x, x, x[0], x[0]),
    ):
        with pytest.raises(ValueError, match="is on cpu, expected a GPU"):
            call()
