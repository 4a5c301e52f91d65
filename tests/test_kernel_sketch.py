"""The sketch's kernels against torch operations on the same inputs.

Suffixes: B sequences, G KV heads, H query heads, T tokens, K groups of tokens, D head size, C channels of one width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import nullcontext
from math import ceil

import pytest
import torch
from capturable import Capturable
from emulated import emulated_gpu
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.csrc.sketch import row_splits
from attention_predictor.predictor.quantise import unpack
from attention_predictor.predictor.scores import block_peak_and_sum
from attention_predictor.predictor.sketch import CHUNK_GROUPS, KeySketch

pytestmark = pytest.mark.usefixtures("exact_matmul")
GPUS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUP = 64


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu" and "cuda" as they are; "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


def keys_and_queries(
    tokens: int, *, B: int = 2, G: int = 2, H: int = 6, D: int = 48, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Key_BGTD, whose channels differ in mean and spread, and query_BHTD."""
    generator = torch.Generator().manual_seed(tokens + D)
    spread_GTD = torch.rand(G, 1, D, generator=generator) + 0.2
    key_BGTD = spread_GTD * torch.randn(B, G, tokens, D, generator=generator)
    key_BGTD += 2 * torch.randn(G, 1, D, generator=generator)
    query_BHTD = torch.randn(B, H, tokens, D, generator=generator)
    return key_BGTD.to(device, dtype), query_BHTD.to(device, dtype)


def filled(key_BGTD: Tensor, query_BHTD: Tensor, bits: int = 2, group: int = GROUP) -> KeySketch:
    """A sketch made by torch operations."""
    B, G, _, D = key_BGTD.shape
    shape = {"batch": B, "kv_heads": G, "head_dim": D, "dtype": key_BGTD.dtype, "device": key_BGTD.device}
    sketch = KeySketch(**shape, bits=bits, group=group)
    sketch.extend(key_BGTD, query_BHTD)
    return sketch


def exact_scores(
    sketch: KeySketch, query_BHD: Tensor, scaling: float, softcap: float | None, real_BL: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """What the codes say, in fp64."""
    whole = sketch.length // sketch.group
    key_BGKTD = sketch._zero_BGKD[:, :, :whole, None].double().repeat(1, 1, 1, sketch.group, 1)
    for channels in sketch._coded:
        code_BGKTC = unpack(channels.codes_BGKJC[:, :, :whole], channels.mask_P11).double()
        code_BGKTC.unflatten(-2, (len(channels.factor_P), -1)).mul_(channels.factor_P[:, None, None].double())
        key_BGKTD[..., channels.ranks] += code_BGKTC * sketch._scale_BGKR[:, :, :whole, None, channels.ranks].double()
    key_BGTD = key_BGKTD.flatten(2, 3)
    key_BGTD = key_BGTD.gather(-1, sketch._order_BGD.argsort(-1)[:, :, None].expand_as(key_BGTD))
    key_BGTD = torch.cat([key_BGTD, sketch._tail_BGTD[:, :, : sketch.length % sketch.group].double()], 2)
    query_BGhD = query_BHD.double().unflatten(1, (key_BGTD.shape[1], -1))
    logits_BHT = (scaling * query_BGhD @ key_BGTD.transpose(-1, -2)).flatten(1, 2)
    if softcap is not None:
        logits_BHT = softcap * torch.tanh(logits_BHT / softcap)
    if real_BL is not None:
        logits_BHT = logits_BHT.masked_fill(~real_BL[:, None], -torch.inf)
    return block_peak_and_sum(logits_BHT, block_size)


def largest_error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    errors = []
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one == -torch.inf, other == -torch.inf)
        errors.append((one.double() - other).masked_fill(other == -torch.inf, 0).abs().max())
    return float(max(errors))


def check_scores(sketch: KeySketch, query_BHD: Tensor, extra: str = "plain", block_size: int = 16) -> None:
    """Errors at most twice those of torch operations in fp32."""
    B, L, D = query_BHD.shape[0], sketch.length, query_BHD.shape[2]
    real_BL = None
    if extra == "padded":
        real_BL = (
            torch.arange(L, device=query_BHD.device) >= torch.tensor([0, L // 3], device=query_BHD.device)[:B, None]
        )
    arguments = (query_BHD, D**-0.5, 2.0 if extra == "softcap" else None)
    exact = exact_scores(sketch, *arguments, real_BL, block_size)
    options = {"block_size": block_size, "real_BL": real_BL}
    own = largest_error(sketch.block_scores(*arguments, **options), exact)
    found = largest_error(sketch.block_scores(*arguments, **options, kernel=True), exact)
    floor = 4e-6 * float(exact[0].abs().masked_fill(exact[0] == -torch.inf, 0).max().clamp_min(1))
    assert found <= 2 * own + floor


# Scores


@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("extra", ["plain", "padded", "softcap"])
def test_scores(device: str, dtype: torch.dtype, bits: int, extra: str) -> None:
    key_BGTD, query_BHTD = keys_and_queries(4 * GROUP + 21, dtype=dtype, device=device)
    check_scores(filled(key_BGTD, query_BHTD, bits), query_BHTD[:, :, -1], extra)


@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    "shape",
    [
        {"D": 128, "H": 8},
        {"D": 64, "H": 2},
        {"D": 256, "H": 2, "B": 1},
        {"D": 96, "H": 14},
        {"D": 80, "G": 1, "H": 19, "B": 1},
        {"D": 248},
        {"D": 24},
        {"D": 8, "G": 1, "H": 1, "B": 1},
    ],
    ids=str,
)
def test_scores_of_any_shape(device: str, bits: int, shape: dict[str, int]) -> None:
    key_BGTD, query_BHTD = keys_and_queries(5 * GROUP + 40, **shape, dtype=torch.bfloat16, device=device)
    check_scores(filled(key_BGTD, query_BHTD, bits), query_BHTD[:, :, -1], "padded")


@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 128, 1029])
def test_scores_of_any_length(device: str, tokens: int) -> None:
    key_BGTD, query_BHTD = keys_and_queries(tokens, dtype=torch.float16, device=device)
    for block_size in (8, 16, 32, 64):
        check_scores(filled(key_BGTD, query_BHTD), query_BHTD[:, :, -1], block_size=block_size)


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("of_keys", "of_queries"), [(1e4, 1.0), (1e-4, 1.0), (1.0, 1e5), (1.0, 1e-6), (0.0, 1.0), (1.0, 0.0)]
)
def test_scores_of_any_magnitude(device: str, bits: int, of_keys: float, of_queries: float) -> None:
    """The halves that products are made of neither overflow nor lose what they have to hold."""
    key_BGTD, query_BHTD = keys_and_queries(2 * GROUP, dtype=torch.float32, device=device)
    key_BGTD[..., 3] *= 5  # a channel larger than the others
    check_scores(filled(of_keys * key_BGTD, query_BHTD, bits), of_queries * query_BHTD[:, :, -1])


@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
@pytest.mark.parametrize("tokens", [GROUP, 2 * GROUP + 17, 3 * GROUP + 1])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_room_for_more_blocks(device: str, tokens: int, kernel: bool) -> None:
    """The same as of the sequence's blocks alone, whatever there is room for."""
    key_BGTD, query_BHTD = keys_and_queries(tokens, dtype=torch.bfloat16, device=device)
    sketch, query_BHD, room = filled(key_BGTD, query_BHTD), query_BHTD[:, :, -1], 704
    sketch.reserve(room)
    real_BL = torch.arange(room, device=device) >= torch.tensor([0, 40], device=device)[:, None]
    options = {"block_size": 16, "kernel": kernel}
    wanted = sketch.block_scores(query_BHD, 0.2, **options, real_BL=real_BL[:, :tokens])
    length_B = torch.tensor([tokens, tokens], device=device)
    found = sketch.block_scores(query_BHD, 0.2, **options, real_BL=real_BL, capacity=room // 16, length_B=length_B)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == (2, 6, room // 16)
        assert torch.equal(one[..., : other.shape[2]], other)
        assert kernel or (one[..., other.shape[2] :] == -torch.inf).all()


@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
def test_scores_of_unlike_lengths(device: str) -> None:
    """Each sequence of a batch has the blocks of its own length; operations are those of any other lengths."""
    key_BGTD, query_BHTD = keys_and_queries(3 * GROUP, dtype=torch.bfloat16, device=device)
    sketch, query_BHD, records = filled(key_BGTD, query_BHTD), query_BHTD[:, :, -1], []
    sketch.reserve(800)
    options = {"block_size": 16, "kernel": True}
    for lengths in ([3 * GROUP, 2 * GROUP], [GROUP, 3 * GROUP]):
        length_B = torch.tensor(lengths, device=device)
        with Capturable() as capturable:
            found = sketch.block_scores(query_BHD, 0.2, **options, capacity=50, length_B=length_B)
        records.append(capturable.record)
        for b, length in enumerate(lengths):
            alone = copy.deepcopy(sketch)
            alone.crop(length)
            for one, other in zip(found, alone.block_scores(query_BHD, 0.2, **options), strict=True):
                assert torch.equal(one[b, :, : length // 16], other[b])
    assert records[0] == records[1]


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_what_no_kernel_reads_is_named_and_left_to_torch(device: str) -> None:
    cases = {
        "in groups of 16 tokens, only of 64": ({}, 16, 16),
        "head size of 12, only for multiples of 8 up to 256": ({"D": 12}, GROUP, 16),
        "with blocks of 24 tokens, only of 8, 16, 32, 64": ({}, GROUP, 24),
    }
    for reason, (shape, group, block_size) in cases.items():
        key_BGTD, query_BHTD = keys_and_queries(200, **shape, dtype=torch.float32, device=device)
        sketch, query_BHD = filled(key_BGTD, query_BHTD, group=group), query_BHTD[:, :, -1]
        assert reason in (sketch.why_no_kernel(block_size) or "")
        wanted = sketch.block_scores(query_BHD, 0.2, block_size=block_size)
        found = sketch.block_scores(query_BHD, 0.2, block_size=block_size, kernel=True)
        assert all(map(torch.equal, found, wanted))


# Keys that become codes


def check_alike(found: KeySketch, wanted: KeySketch, key_BGTD: Tensor) -> None:
    """The same sketch, but for ties of rounding: those of few codes, and of the last bit of scale and zero."""
    found.check_integrity()
    assert found.length == wanted.length
    assert torch.equal(found._order_BGD, wanted._order_BGD)
    tail, whole = wanted.length % GROUP, wanted.length // GROUP
    assert torch.equal(found._tail_BGTD[:, :, :tail], wanted._tail_BGTD[:, :, :tail])
    for name in ("_scale_BGKR", "_zero_BGKD"):
        one, other = (getattr(sketch, name)[:, :, :whole].float() for sketch in (found, wanted))
        # Of two widths that err alike either may be taken; all else differs in the last bit, and seldom.
        assert (~torch.isclose(one, other, atol=2**-24, rtol=2**-10)).float().mean() < 0.01
        assert (one != other).float().mean() < 0.02
    for one, other in zip(found._coded, wanted._coded, strict=True):
        assert (one.codes_BGKJC[:, :, :whole] != other.codes_BGKJC[:, :, :whole]).float().mean() < 0.01
    error, own = ((sketch.dequantise().double() - key_BGTD.double()).square().mean() for sketch in (found, wanted))
    assert error <= 1.001 * own + 1e-12


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [{}, {"D": 128, "B": 1}, {"D": 24, "G": 1}], ids=str)
def test_whole_groups(device: str, dtype: torch.dtype, bits: int, shape: dict[str, int]) -> None:
    """In pieces that end anywhere; keys as attention has them, tokens before heads."""
    key_BGTD, query_BHTD = keys_and_queries(4 * GROUP + 9, **shape, dtype=dtype, device=device)
    key_BGTD = key_BGTD.transpose(1, 2).contiguous().transpose(1, 2)
    sketches = []
    for kernel in (False, True):
        sketch = filled(key_BGTD[:, :, :0], query_BHTD[:, :, :0], bits)
        for piece in (slice(0, 90), slice(90, 100), slice(100, None)):
            sketch.extend(key_BGTD[:, :, piece], query_BHTD[:, :, piece], kernel=kernel)
        sketches.append(sketch)
    check_alike(sketches[1], sketches[0], key_BGTD)


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 3e4])
def test_codes_of_any_size_of_keys(device: str, size: float) -> None:
    """Constant channels, scales that half precision rounds to zero, keys beyond its range."""
    key_BGTD, query_BHTD = keys_and_queries(2 * GROUP, D=16, dtype=torch.float32, device=device)
    key_BGTD = key_BGTD * size
    key_BGTD[..., 0] = 7.0
    wanted = filled(key_BGTD, query_BHTD)
    found = filled(key_BGTD[:, :, :0], query_BHTD[:, :, :0])
    found.extend(key_BGTD, query_BHTD, kernel=True)
    check_alike(found, wanted, key_BGTD)


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize("on_device", [False, True], ids=["extend", "append"])
@pytest.mark.parametrize("bits", [2, 8])
def test_token_by_token(device: str, on_device: bool, bits: int) -> None:
    """Over the ends of groups, in place where there is room; as steps that the host sees, and as ones it doesn't."""
    tokens, prompt = 3 * GROUP + 5, GROUP + 60
    key_BGTD, query_BHTD = keys_and_queries(tokens, dtype=torch.bfloat16, device=device)
    found = filled(key_BGTD[:, :, :prompt], query_BHTD[:, :, :prompt], bits)
    wanted = filled(key_BGTD[:, :, :prompt], query_BHTD[:, :, :prompt], bits)
    wanted.extend(key_BGTD[:, :, prompt:], query_BHTD[:, :, prompt:])
    found.reserve(tokens)
    held = [getattr(owner, name).data_ptr() for owner, name in found._held()]
    length_B, records = torch.tensor([prompt, prompt], device=device), []
    for token in range(prompt, tokens):
        if on_device:
            length_B += 1
            found.advance()
            key_BGD, query_BHD = key_BGTD[:, :, token], query_BHTD[:, :, token]
            with Capturable() as capturable:
                found.append(key_BGD, query_BHD, length_B, kernel=True)
            records.append(capturable.record)
        else:
            found.extend(key_BGTD[:, :, token : token + 1], query_BHTD[:, :, token : token + 1], kernel=True)
    assert all(record == records[0] for record in records)
    assert held == [getattr(owner, name).data_ptr() for owner, name in found._held()]
    check_alike(found, wanted, key_BGTD)


@pytest.mark.parametrize("device", GPUS, indirect=True)
def test_tokens_of_unlike_lengths(device: str) -> None:
    """Each sequence's token goes where its own length says; it alone completes a group."""
    key_BGTD, query_BHTD = keys_and_queries(2 * GROUP, dtype=torch.float32, device=device)
    sketch = filled(key_BGTD, query_BHTD)
    sketch.reserve(3 * GROUP)
    before = copy.deepcopy(sketch)
    sketch.advance()
    length_B = torch.tensor([2 * GROUP + 5, 3 * GROUP], device=device)
    sketch.append(key_BGTD[:, :, 7], query_BHTD[:, :, 7], length_B, kernel=True)
    wanted_BGTD = before._tail_BGTD.clone()
    wanted_BGTD[0, :, 4], wanted_BGTD[1, :, GROUP - 1] = key_BGTD[0, :, 7], key_BGTD[1, :, 7]
    assert torch.equal(sketch._tail_BGTD, wanted_BGTD)
    for (owner, name), (old, _) in zip(sketch._grouped(), before._grouped(), strict=True):
        new, old = getattr(owner, name), getattr(old, name)
        assert torch.equal(new[0], old[0])
        assert torch.equal(new[1, :, :2], old[1, :, :2])
        assert new[1, :, 2].any()


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_room_for_more(device: str) -> None:
    key_BGTD, query_BHTD = keys_and_queries(GROUP, dtype=torch.float32, device=device)
    sketch = filled(key_BGTD[:, :, :-1], query_BHTD[:, :, :-1])
    assert sketch.capacity == GROUP - 1
    sketch.advance()  # the first group, with which the order of the channels is found, is not the kernel's
    sketch.append(key_BGTD[:, :, -1], query_BHTD[:, :, -1], torch.tensor([GROUP, GROUP]), kernel=True)
    check_alike(sketch, filled(key_BGTD, query_BHTD), key_BGTD)
    assert sketch.capacity == (CHUNK_GROUPS + 1) * GROUP - 1
    more = sketch.capacity - GROUP
    sketch.extend(key_BGTD[:, :, :1].repeat(1, 1, more, 1), query_BHTD[:, :, :1].repeat(1, 1, more, 1), kernel=True)
    sketch.advance()
    with pytest.raises(ValueError, match="there is room for 1087 tokens, but this would be token 1088"):
        sketch.append(key_BGTD[:, :, 0], query_BHTD[:, :, 0], torch.tensor([1088, 1088]), kernel=True)
    sketch.reserve(1088)
    sketch.append(key_BGTD[:, :, 0], query_BHTD[:, :, 0], torch.tensor([1088, 1088]), kernel=True)
    sketch.check_integrity()
    assert sketch.capacity == (2 * CHUNK_GROUPS + 1) * GROUP - 1


# Arguments


@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
def test_torch_compile_knows_the_shapes(device: str) -> None:
    key_BGTD, query_BHTD = keys_and_queries(2 * GROUP + 3, dtype=torch.float32, device=device)
    sketch = filled(key_BGTD, query_BHTD)
    scores = (query_BHTD[:, :, -1].contiguous(), *sketch._tensors(), sketch.length, None, None, 16, 0.2, 0.0)
    torch.library.opcheck(ops.sketch_scores, scores, test_utils=("test_schema", "test_faketensor"))
    if sketch._why_no_kernel(None) is None:
        append = (key_BGTD[:, :, 0].contiguous(), *sketch._tensors(), sketch.length + 1, None)
        torch.library.opcheck(ops.sketch_append, append, test_utils=("test_schema", "test_faketensor"))
        store = (key_BGTD[:, :, :GROUP], *sketch._tensors(), 0)
        torch.library.opcheck(ops.sketch_store, store, test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments_are_named() -> None:
    key_BGTD, query_BHTD = keys_and_queries(2 * GROUP + 3, dtype=torch.float32, device="cpu")
    sketch, query_BHD = filled(key_BGTD, query_BHTD), query_BHTD[:, :, -1].contiguous()
    tensors, rest = sketch._tensors(), (None, 16, 0.2, 0.0)
    wrong = {
        "query_BHD: expected torch.float32 [2, 6, 48] on cpu, contiguous; found torch.float16": (query_BHD.half(), 131),
        "query_BHD has 5 heads, expected a multiple of the sketch's 2 KV heads": (query_BHD[:, :5].contiguous(), 131),
        "length is 1088 tokens, expected at most 16 whole groups of 64": (query_BHD, 1088),
    }
    for message, (query, length) in wrong.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            ops.sketch_scores(query, *tensors, length, None, *rest)
    for length_B in (torch.tensor([131, 131], dtype=torch.int32), torch.tensor([131])):
        with pytest.raises(ValueError, match=r"^length_B: expected torch.int64 \[2\] on cpu"):
            ops.sketch_scores(query_BHD, *tensors, 131, length_B, *rest)
    with pytest.raises(ValueError, match=r"^real_BL: expected torch.bool \[2, 131\]"):
        ops.sketch_scores(query_BHD, *tensors, 131, None, torch.ones(2, 130, dtype=torch.bool), *rest[1:])
    # The tail may have any dtype, the query must have it too.
    named = ("order_BGD", "query_BHD", "zero_BGKD", "scale_BGKR", "wide_BGKJC", "narrow_BGKJC")
    for place, name in enumerate(named):
        bad = [tensor.double() if i == place else tensor for i, tensor in enumerate(tensors) if tensor is not None]
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            ops.sketch_scores(query_BHD, *bad, 131, None, *rest)
    with pytest.raises(ValueError, match=r"^no CPU kernel quantises a sketch's keys"):
        ops.sketch_append(key_BGTD[:, :, 0].contiguous(), *tensors, 132, None)
    with pytest.raises(ValueError, match=re.escape("key_BGTD: expected torch.float32 [2, 2, -1, 48]")):
        ops.sketch_store(key_BGTD[:, :, :70], *tensors, 0)
    with pytest.raises(ValueError, match="groups 15 to 17 are to be stored, there is room for 16"):
        ops.sketch_store(key_BGTD[:, :, :128], *tensors, 15)


def test_how_rows_are_divided_among_thread_blocks() -> None:
    """As many as run at once take few rows; of many rows the last round is full, or short."""
    assert [row_splits(rows, 512, 660) for rows in (8, 16, 32, 64, 128)] == [81, 40, 19, 9, 4]
    assert row_splits(8, 0, 660) == row_splits(5000, 1, 660) == 1
    for rows in (256, 384, 512, 704):
        splits = row_splits(rows, 512, 660)
        rounds = rows * (splits + 1) / 660
        assert splits > 1
        assert rounds / ceil(rounds) > 0.85
