"""Kernels against their references on the same inputs, on this CPU and, marked gpu, on a CUDA device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from emulated import emulated_gpu, libraries
from torch import Tensor

from attention_predictor.csrc import binding, ops
from attention_predictor.offload.attention.dense import Terms
from attention_predictor.offload.attention.sparse import Reach, attend_slots, score_slots
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.host_store import HostStore, gather_reference

pytestmark = pytest.mark.usefixtures("exact_matmul")
DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu" and "cuda" as they are; "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


def pool_case(
    device: str, dtype: torch.dtype, *, B: int = 2, G: int = 2, H: int = 8, S: int = 13, T: int = 16, D: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]:
    """Query, keys, values, blocks (some slots empty, the tail block partly filled), length and padding."""
    generator = torch.Generator().manual_seed(D + S)
    query = torch.randn(B, H, D, generator=generator)
    key, value = torch.randn(2, B, G, S, T, D, generator=generator)
    blocks = torch.stack([torch.randperm(2 * S, generator=generator)[:S] for _ in range(B * G)]).view(B, G, S)
    blocks[blocks % 5 == 3] = -1
    blocks[..., 0] = 2 * S  # the tail block
    length = 2 * S * T + T // 2 + 1
    real = torch.arange(length) >= torch.tensor([[0], [T + 3]]).repeat(B, 1)[:B]
    tensors = [one.to(device, dtype) for one in (query, key, value)]
    return *tensors, blocks.to(device), length, real.to(device)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"H": 2},
        {"H": 14, "D": 128},
        {"H": 6, "D": 96, "S": 40},
        {"H": 4, "D": 256, "B": 1},
        {"D": 16, "T": 8},
        {"D": 32, "T": 64, "S": 3},
        {"D": 8, "T": 21, "S": 9},
        {"H": 20, "G": 1, "B": 1},
        {"G": 1, "H": 1, "S": 1, "B": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("extra", ["plain", "padded", "softcap", "sinks"])
def test_sparse_attention(device: str, dtype: torch.dtype, shape: dict[str, int], extra: str) -> None:
    """Errors, against the reference in fp64, at most twice the reference's own in the pool's precision."""
    query, key, value, blocks, length, real = pool_case(device, dtype, **shape)
    sinks = torch.randn(query.shape[1], device=device) if extra == "sinks" else None
    terms = Terms(query.shape[-1] ** -0.5, 3.0 if extra == "softcap" else None, sinks)
    length_B = torch.full((len(query),), length, device=device)
    arguments = (blocks, length_B, real if extra == "padded" else None, terms)
    exact = attend_slots(query.double(), key.double(), value.double(), *arguments)
    reference = attend_slots(query, key, value, *arguments)
    found = attend_slots(query, key, value, *arguments, kernel=True)
    own = float((reference.out_BHD.double() - exact.out_BHD).abs().max())
    floor = 2e-6  # where the reference happens to be exact
    assert float((found.out_BHD.double() - exact.out_BHD).abs().max()) <= 2 * own + floor
    if dtype != torch.float32:  # weights as good as fp32, so that nothing but the last rounding is left
        assert float((found.out_BHD == reference.out_BHD).float().mean()) > 0.95
    torch.testing.assert_close(found.lse_BH, reference.lse_BH, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.scores.peak_BHS, reference.scores.peak_BHS, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.scores.sum_BHS, reference.scores.sum_BHS, atol=2e-5, rtol=1e-5)
    assert same(found.scores, score_slots(query, key, *arguments, kernel=True))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_takes_no_part_may_be_no_number(device: str, dtype: torch.dtype) -> None:
    query, key, value, blocks, length, real = pool_case(device, dtype)
    arguments = (blocks, length, real, None, 0.125, 0.0)
    found = ops.sparse_decode(query, key, value, *arguments)
    token = blocks[..., None] * 16 + torch.arange(16, device=device)
    hidden = (blocks[..., None] < 0) | (token >= length)
    hidden |= ~real.gather(1, token.clamp(0, length - 1).flatten(1)).view_as(hidden)
    assert bool(hidden.any(-1).any(-1).all())
    key, value = (one.masked_fill(hidden[..., None], float("nan")) for one in (key, value))
    assert same(ops.sparse_decode(query, key, value, *arguments), found)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_length_may_be_known_on_the_device_alone(device: str) -> None:
    query, key, value, blocks, length, real = pool_case(device, torch.bfloat16)
    rest = (None, 0.125, 0.0)
    length_B, room = torch.full((len(query),), length, device=device), length + 77
    padded = torch.nn.functional.pad(real, (0, room - length), value=True)
    for values in (value, None):
        wanted = ops.sparse_decode(query, key, values, blocks, length, real, *rest)
        assert same(ops.sparse_decode(query, key, values, blocks, room, padded, *rest, length_B), wanted)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_sequences_have_lengths_of_their_own(device: str) -> None:
    query, key, value, blocks, length, _ = pool_case(device, torch.bfloat16)
    length_B, terms = torch.tensor([length, length - 100], device=device), Terms(0.125)
    for kernel in (False, True):
        found = attend_slots(query, key, value, blocks, length_B, None, terms, kernel=kernel)
        for b in range(2):
            part = (x[b : b + 1] for x in (query, key, value, blocks, length_B))
            alone = attend_slots(*part, None, terms, kernel=kernel)
            torch.testing.assert_close(found.out_BHD[b : b + 1], alone.out_BHD)
            torch.testing.assert_close(found.scores.sum_BHS[b : b + 1], alone.scores.sum_BHS)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limits", [{"window": 100}, {"window": 3}, {"window": 7000}, {"chunk": 48}, {"chunk": 50}, {}])
@pytest.mark.parametrize("padded", [False, True])
def test_how_far_back_the_newest_token_sees(device: str, dtype: torch.dtype, limits: dict, padded: bool) -> None:
    """As if what it does not see were ruled out token by token; lengths and padding differ between sequences."""
    query, key, value, blocks, length, _ = pool_case(device, dtype, S=27)
    blocks[..., 1:] = torch.arange(2 * 27 - 26, 2 * 27, device=device)  # all of the last ones
    lengths, paddings = [length, length - 41], [0, 19] if padded else [0, 0]
    length_B = torch.tensor(lengths, device=device)
    seen_BL = torch.zeros(2, length, dtype=torch.bool)
    for b, (end, padding) in enumerate(zip(lengths, paddings, strict=True)):
        first = max(padding, end - limits.get("window", end))
        if chunk := limits.get("chunk"):
            first = end - 1 - (end - 1 - padding) % chunk
        seen_BL[b, first:end] = True
    reach = Reach(torch.tensor(paddings, device=device) if padded else None, **limits)
    pool, terms = (query, key, value, blocks, length_B), Terms(0.125)
    wanted = attend_slots(*pool, seen_BL.to(device), terms)
    for kernel, tolerance in ((False, 0.0), (True, 2e-5 if dtype == torch.float32 else 2e-2)):
        found = attend_slots(*pool, None, terms, kernel=kernel, reach=reach)
        torch.testing.assert_close(found.out_BHD, wanted.out_BHD, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found.lse_BH, wanted.lse_BH, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
@pytest.mark.parametrize(("multiprocessors", "H", "S"), [(1, 1, 523), (3, 9, 70), (500, 9, 70)])
def test_slots_are_shared_out(device: str, multiprocessors: int, H: int, S: int, monkeypatch) -> None:
    """Whatever number of thread blocks shares them, the last one merges them, call after call."""
    query, key, value, blocks, length, real = pool_case(device, torch.float16, B=1, G=1, H=H, S=S, T=1, D=16)
    length_B = torch.full((1,), length, device=device)
    arguments = (query, key, value, blocks, length_B, real, Terms(0.25))
    wanted = attend_slots(*arguments)
    monkeypatch.setattr(binding, "multiprocessors", lambda _: multiprocessors)
    arrived = torch.zeros(query.shape[:2], dtype=torch.int32, device=device)
    for _ in range(2):
        found = attend_slots(*arguments, kernel=True, arrived_BH=arrived)
        torch.testing.assert_close(found.out_BHD, wanted.out_BHD, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.lse_BH, wanted.lse_BH, atol=2e-5, rtol=1e-5)
        assert not bool(arrived.any())


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_torch_compile_knows_the_shapes(device: str) -> None:
    query, key, value, blocks, length, real = pool_case(device, torch.float32)
    for values in (value, None):
        arguments = (query, key, values, blocks, length, real, None, 0.125, 0.0)
        operation = torch.ops.attention_predictor.sparse_decode.default
        torch.library.opcheck(operation, (*arguments, None, None), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(ops.sparse_decode, fullgraph=True, backend="aot_eager")
    assert same(compiled(*arguments), ops.sparse_decode(*arguments))


def filled_store(dtype: torch.dtype, memory: HostMemory | None = None) -> HostStore:
    store = HostStore(batch=2, kv_heads=3, head_dim=16, dtype=dtype, slab_blocks=4, memory=memory)
    generator = torch.Generator().manual_seed(0)
    store.append(*torch.randn(2, 2, 3, 16 * 21 + 5, 16, generator=generator).to(dtype))
    return store


def entries(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(6, (count,), generator=generator), torch.randint(22, (count,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_gather_to_host(dtype: torch.dtype, count: int) -> None:
    store, (row, block) = filled_store(dtype), entries(count)
    wanted = torch.empty(count, 2, 16, 16, dtype=dtype)
    if count:
        gather_reference(store._slabs, row, block, wanted)
    assert torch.equal(store.gather(row, block), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_move_blocks(dtype: torch.dtype) -> None:
    store = filled_store(dtype, HostMemory([torch.device("cuda")]))
    shape = {"batch": 2, "kv_heads": 3, "slots": 12, "block_size": 16, "head_dim": 16, "dtype": dtype}
    by_kernel, by_copy = (BlockPool(**shape, device="cuda") for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    slot_RS, block_RS = (
        torch.stack([torch.randperm(count, generator=generator)[:12] for _ in range(6)]) for count in (12, 22)
    )
    moves_R = torch.tensor([0, 1, 12, 7, 0, 3])
    row_n, place_n = (torch.arange(12) < moves_R[:, None]).nonzero(as_tuple=True)
    by_copy.write_blocks(row_n, slot_RS[row_n, place_n], store.gather(row_n, block_RS[row_n, place_n]))
    lists = (x.int().cuda() for x in (block_RS, slot_RS, moves_R))
    pool = (by_kernel.key_BGSTD, by_kernel.value_BGSTD)
    slabs = ops.Slabs(store.addresses(torch.device("cuda", 0)), store.slab_blocks)
    ops.move_blocks(slabs, *lists, *pool, None)
    assert torch.equal(by_kernel.key_BGSTD, by_copy.key_BGSTD)
    assert torch.equal(by_kernel.value_BGSTD, by_copy.value_BGSTD)


def test_wrong_arguments_are_named() -> None:
    query, key, value, blocks, length, real = pool_case("cpu", torch.float32)
    good = [query, key, value, blocks, length, real, None, 0.125, 0.0, None, None, None, 0, 0]
    cases = {
        "query_BHD: expected torch.float32 [2, 8, 64] on cpu, contiguous; found torch.float16": (0, query.half()),
        "value_BGSTD: expected": (2, value[..., :32]),
        "block_BGS: expected torch.int64 [2, 2, 13]": (3, blocks.int()),
        "real_BL: expected torch.bool [2, 425]": (5, real[:, :-1]),
        "sinks_H: expected torch.float32 [8]": (6, torch.zeros(4)),
        "length_B: expected torch.int64 [2]": (9, torch.tensor([425])),
        "arrived_BH: expected torch.int32 [2, 8]": (10, torch.zeros(2, 8)),
        "padding_B: expected torch.int64 [2]": (11, torch.zeros(2)),
        "window and chunk: expected tokens, or 0 for all, got -1 and 0": (12, -1),
    }
    for message, (place, bad) in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            ops.sparse_decode(*good[:place], bad, *good[place + 1 :])
    with pytest.raises(ValueError, match=r"head size of 12, expected .* a multiple of 8 up to 256"):
        pool = torch.zeros(1, 1, 2, 16, 12)
        ops.sparse_decode(torch.zeros(1, 1, 12), pool, pool, torch.zeros(1, 1, 2).long(), 32, None, None, 1.0, 0.0)


def test_an_emulated_device_has_every_kernel() -> None:
    of_sources = libraries()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in (8, 64, 80, 128, 256):
            for one in ops.kernels_of(dtype, head_dim, sketch_bits=4, predictor="paper"):
                assert hasattr(of_sources[one.source], one.name)
    assert len(ops.kernels_of(torch.float64, 512, sketch_bits=2, predictor=None)) == 7
