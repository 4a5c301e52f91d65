"""Blocks as codes: the arithmetic, and the kernels against the torch operations, bit by bit.

Suffixes: as in csrc/block_code.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from emulated import emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.csrc.block_code import (
    BITS,
    VECTOR_BYTES,
    block_bytes,
    decode_reference,
    encode_reference,
    head_bytes,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


def blocks(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers with channels far from zero, as keys have them; and zeros, equals, tiny ones, the largest ones, NaN."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=made) + 4 * torch.randn(shape[-1], generator=made)
    flat = x.view(-1, *shape[-2:])
    flat[0] = 0
    flat[1 % len(flat)] = flat[1 % len(flat), :1].clone()
    flat[2 % len(flat), 0] = 3e-7
    flat[3 % len(flat), -1, -1] = math.nan
    flat[4 % len(flat), 0, 0] = -math.inf
    x = x.to(dtype)
    x.view(-1, *shape[-2:])[5 % len(flat), ::2] = torch.finfo(dtype).max  # decoded to more, were it not for the limit
    x.view(-1, *shape[-2:])[6 % len(flat), ::2] = torch.finfo(dtype).min
    return x


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    return torch.equal(found.nan_to_num(77.0), wanted.nan_to_num(77.0)) and torch.equal(found.isnan(), wanted.isnan())


@settings(max_examples=60, deadline=None)
@given(
    T=st.sampled_from([1, 2, 16, 32]),
    D=st.integers(1, 40),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_a_number_is_off_by_half_a_step(T: int, D: int, bits: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    """A step is the group's range over 2^bits − unit, or 1 / (127 · unit) of its lowest number, rounded up to bf16."""
    made = torch.Generator().manual_seed(seed)
    kv_2TD = ((torch.randn(2, T, D, generator=made) + 3 * torch.randn(D, generator=made)) * scale).to(dtype)
    code_b = encode_reference(*kv_2TD, bits)
    assert code_b.shape == (block_bytes(T, D, bits),)
    assert block_bytes(T, D, bits) % VECTOR_BYTES == 0
    assert torch.equal(code_b, encode_reference(*kv_2TD.clone(), bits))
    found_2TD = decode_reference(code_b, T, D, bits, dtype)
    unit = 2**bits / 16
    for side, group in ((0, 0), (1, 1)):
        x_TD = kv_2TD[side].double()
        low, high = x_TD.aminmax(dim=group, keepdim=True)
        step = torch.maximum((high - low) / (2**bits - unit), low.abs() / (127 * unit)) * (1 + 2**-7)
        rounding = x_TD.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
        off = (found_2TD[side].double() - x_TD).abs()
        assert (off <= 0.501 * step + rounding).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_group_with_a_number_that_is_not_finite_is_nan(bits: int) -> None:
    key, value = torch.randn(2, 16, 8).unbind(0)
    key[3, 2], value[5, 1] = math.nan, math.inf
    found_2TD = decode_reference(encode_reference(key, value, bits), 16, 8, bits, torch.float32)
    assert torch.equal(found_2TD[0].isnan(), (torch.arange(8) == 2).expand(16, 8))
    assert torch.equal(found_2TD[1].isnan(), (torch.arange(16) == 5)[:, None].expand(16, 8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_numbers_stay_finite(dtype: torch.dtype, bits: int) -> None:
    """Near the largest ones, where half a step more would be infinite."""
    made = torch.Generator().manual_seed(0)
    for sign in (-1, 1):
        key, value = (sign * torch.finfo(dtype).max * (1 - 0.02 * torch.rand(2, 16, 64, generator=made))).to(dtype)
        found_2TD = decode_reference(encode_reference(key, value, bits), 16, 64, bits, dtype)
        assert found_2TD.isfinite().all()
        assert ((found_2TD.double() / torch.finfo(dtype).max).abs() > 0.9).all()


@pytest.mark.parametrize(("bits", "share"), [(8, 0.5527), (4, 0.3027)])
def test_a_block_of_16_tokens_takes_about_half_or_a_third(bits: int, share: float) -> None:
    """Of bf16, with a head size of 128; a quarter would leave nothing for scales."""
    assert block_bytes(16, 128, bits) / (2 * 16 * 128 * 2) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(16, 64), (16, 80), (4, 24), (1, 8), (32, 136)])
def test_encode_blocks(device: str, dtype: torch.dtype, bits: int, T: int, D: int) -> None:
    key = blocks(2, 3, 2 * T, D, dtype=dtype).to(device)
    value = blocks(2, 2 * T, 3, D, dtype=dtype, seed=1).to(device).transpose(1, 2)  # as a projection leaves it
    found_BGNb = ops.encode_blocks(key, value, T, bits)
    wanted_BGNb = encode_reference(key.unflatten(2, (-1, T)), value.unflatten(2, (-1, T)), bits)
    assert torch.equal(found_BGNb, wanted_BGNb)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(16, 64), (4, 24), (64, 72)])
def test_move_coded_blocks(device: str, dtype: torch.dtype, bits: int, T: int, D: int) -> None:
    """Complete blocks are decoded, one that isn't is copied as it is; sequences may have other lengths."""
    B, G, S, N, slab_blocks = 2, 2, 5, 7, 4
    kv = blocks(2, B * G, 2 * slab_blocks * T, D, dtype=dtype).unflatten(2, (-1, T))
    code_RNb = encode_reference(*kv, bits)
    pinned = device == "cuda"
    slabs = [slab.contiguous() for slab in code_RNb.split(slab_blocks, 1)]  # of both sequences together
    open_R2TD = blocks(B * G, 2, T, D, dtype=dtype, seed=2)
    if pinned:
        slabs, open_R2TD = [slab.pin_memory() for slab in slabs], open_R2TD.pin_memory()
    address_Rs = torch.tensor([[part.data_ptr() for part in slab] for slab in slabs], device=device).T.contiguous()
    length_B = torch.tensor([6 * T + T // 2, 5 * T], device=device)  # block 6 is open; none is, as block 5 has no token
    made = torch.Generator().manual_seed(1)
    block_RS = torch.stack([torch.randperm(N, generator=made)[:S] for _ in range(B * G)])
    block_RS[0, 0], block_RS[2:] = 6, block_RS[2:] % 5
    slot_RS = torch.stack([torch.randperm(S, generator=made) for _ in range(B * G)])
    moves_R = torch.tensor([S, 1, 0, 3])
    pool = [torch.zeros(B, G, S, T, D, dtype=dtype, device=device) for _ in range(2)]
    wanted = [side.cpu().clone().flatten(0, 1) for side in pool]
    for row in range(B * G):
        for block, slot in zip(block_RS[row, : moves_R[row]], slot_RS[row], strict=False):
            decoded = decode_reference(code_RNb[row, block], T, D, bits, dtype)
            found = open_R2TD[row] if row < G and block == 6 else decoded
            wanted[0][row, slot], wanted[1][row, slot] = found
    lists = (x.int().to(device) for x in (block_RS, slot_RS, moves_R))
    given = {"open_R2TD": open_R2TD, "length_B": length_B, "bits": bits}
    stall = torch.zeros(1, dtype=torch.int64, device=device)
    ops.move_coded_blocks(ops.Slabs(address_Rs, slab_blocks), *lists, *pool, stall, **given)
    assert int(stall) > 0
    for side in range(2):
        assert same(pool[side].cpu().flatten(0, 1), wanted[side])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(16, 64), (4, 24), (1, 8)])
def test_append_coded_token(device: str, dtype: torch.dtype, bits: int, T: int, D: int) -> None:
    """Token by token over two blocks: the open block and the pool get it as it is; a complete block is coded."""
    B, G, S, slab_blocks = 1, 2, 3, 2
    kv = blocks(2, B, G, 2 * T, D, dtype=dtype)
    size = block_bytes(T, D, bits)
    slab = torch.full((B * G, slab_blocks, size), 99, dtype=torch.uint8)
    open_R2TD = torch.full((B * G, 2, T, D), 5.0, dtype=dtype)
    if device == "cuda":
        slab, open_R2TD = slab.pin_memory(), open_R2TD.pin_memory()
    slabs = ops.Slabs(torch.tensor([[part.data_ptr()] for part in slab], device=device), slab_blocks)
    pool = [torch.zeros(B, G, S, T, D, dtype=dtype, device=device) for _ in range(2)]
    slot_RC = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device=device)
    lost_1 = torch.zeros(1, dtype=torch.int64, device=device)
    given = {"open_R2TD": open_R2TD, "bits": bits}
    for token in range(2 * T):
        new = [side[:, :, token].contiguous().to(device) for side in kv]
        length_B = torch.tensor([token + 1], device=device)
        ops.append_coded_token(*new, *pool, slabs, slot_RC, length_B, lost_1, **given)
        if device == "cuda":
            torch.cuda.synchronize()
        block, offset = divmod(token, T)
        exact_2RTD = kv[:, 0, :, block * T : (block + 1) * T].clone()
        exact_2RTD[:, :, offset + 1 :] = 0
        assert same(open_R2TD.movedim(1, 0), exact_2RTD)
        if offset == T - 1:
            assert torch.equal(slab[:, block], encode_reference(*exact_2RTD, bits))
            exact_2RTD = decode_reference(slab[:, block], T, D, bits, dtype).movedim(1, 0)
        for side in range(2):
            in_pool_RTD = pool[side][0].cpu()[torch.arange(G), slot_RC[:, block].cpu().long()]
            assert same(in_pool_RTD[:, : offset + 1], exact_2RTD[side][:, : offset + 1])
    assert int(lost_1) == 0
    slot_RC[1] = -1
    ops.append_coded_token(*new, *pool, slabs, slot_RC, length_B, lost_1, **given)
    assert int(lost_1) == 1


def test_wrong_arguments_are_named() -> None:
    key = torch.randn(1, 1, 16, 8)
    with emulated_gpu():
        for message, given in {
            "key_BGLD has 16 tokens, expected a multiple of 3": (key, key, 3, 8),
            "value_BGLD: expected torch.float32": (key, key[:, :, :8], 16, 8),
            "key_BGLD is torch.float64": (key.double(), key.double(), 16, 8),
        }.items():
            with pytest.raises(ValueError, match=message):
                ops.encode_blocks(*given)
    with pytest.raises(ValueError, match="key_BGLD is on cpu, expected a GPU"):
        ops.encode_blocks(key, key, 16, 8)
    assert head_bytes(16, 8) == 80
