"""The published network, incrementally by kernels, against the network over its whole window on the same rows."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from capturable import Capturable
from emulated import emulated_gpu
from histories import predicted
from torch import Tensor

from attention_predictor.csrc import ops
from attention_predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.incremental import IncrementalHistory, why_no_kernel
from attention_predictor.predictor.window import WindowPredictor

pytestmark = pytest.mark.usefixtures("exact_matmul")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


@pytest.fixture(scope="module")
def network() -> WindowPredictor:
    """Random, with weights large enough for scores that differ."""
    torch.manual_seed(0)
    network = WindowPredictor().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2).add_(0.1 * torch.randn_like(parameter))
        network.conv1.weight.mul_(5)
    return network


def rows_of(count: int, blocks: int, *, batch: int = 1, kv_heads: int = 1, seed: int = 0) -> Tensor:
    """Heavy-tailed scores."""
    return torch.rand(batch, kv_heads, count, blocks, generator=torch.Generator().manual_seed(seed)) ** 8


def compare(
    network: WindowPredictor, windowed: ScoreHistory, incremental: IncrementalHistory, first: int, last: int
) -> None:
    """Errors against fp64, at most twice those of the network in half precision."""
    assert torch.equal(incremental.state_BGNC, windowed.state_BGNC)
    window_BGNC = windowed.state_BGNC[:, :, first:last].cpu()
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(window_BGNC)  # the scores come out in fp32
        in_half = copy.deepcopy(network).half()(window_BGNC)
    found = predicted(incremental, first, last).cpu()
    assert found.shape[2] == windowed.n_blocks
    assert torch.equal(found.isinf(), predicted(windowed, first, last).cpu().isinf())
    own = float((in_half - exact).abs().max())
    assert float((found[..., first:last] - exact).abs().max()) <= 2 * own + 2e-5


@pytest.mark.parametrize(("start", "steps"), [(1, 35), (40, 80)])
def test_many_steps_with_blocks_arriving(device: str, start: int, steps: int, network: WindowPredictor) -> None:
    """More steps than the window has rows; draft tokens are taken back, sequences reordered and copied on the way."""
    on_device = copy.deepcopy(network).to(device)
    shape = {"batch": 1, "kv_heads": 1, "device": device}
    windowed, incremental = ScoreHistory(on_device, **shape), IncrementalHistory(on_device, **shape, kernel=True)
    blocks = 20
    for history in (windowed, incremental):
        history.start(rows_of(start, blocks).to(device))
    for step in range(steps):
        if step == 33:
            blocks -= 2
            for history in (windowed, incremental):
                history.crop(blocks)
        if step == 44:
            incremental.index(torch.tensor([0]))
            incremental = copy.deepcopy(incremental)
        blocks += step % 16 == 0
        row_BGN = rows_of(1, blocks, seed=step)[:, :, 0].to(device)
        for history in (windowed, incremental):
            history.push(row_BGN)
        if step % 13 == 0:
            compare(network, windowed, incremental, 2, blocks - 3)
    compare(network, windowed, incremental, 0, blocks)
    incremental.check_integrity()
    incremental._sum_BGCN[0, 0, 0, 3] *= 1.1
    with pytest.raises(IntegrityError, match="feature sums differ"):
        incremental.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "first", "last"),
    [
        (11, 0, 11),
        (12, 1, 12),
        (125, 0, 125),  # around where tiles meet: each writes 126 blocks
        (130, 3, 128),
        (128, 100, 127),
        (260, 124, 254),
        (260, 0, 260),
        (30, 4, 14),
        (30, 4, 8),
        *((30, 4, 4 + count) for count in (1, 2, 3)),  # fewer than lie at the ends
        (3, 0, 3),
    ],
)
def test_tiles_and_ends(device: str, blocks: int, first: int, last: int, network: WindowPredictor) -> None:
    on_device = copy.deepcopy(network).to(device)
    shape = {"batch": 2, "kv_heads": 1, "device": device}
    windowed, incremental = ScoreHistory(on_device, **shape), IncrementalHistory(on_device, **shape, kernel=True)
    for history in (windowed, incremental):
        history.start(rows_of(70, blocks - 1, batch=2).to(device))
        history.push(rows_of(1, blocks - 1, batch=2, seed=1)[:, :, 0].to(device))
        history.push(rows_of(1, blocks, batch=2, seed=2)[:, :, 0].to(device))  # one more block
    compare(network, windowed, incremental, first, last)


@pytest.mark.parametrize("lengths", [[470, 200], [2060, 90], [64, 1], [112, 95]])
def test_sequences_of_unlike_length_and_padding(device: str, lengths: list[int], network: WindowPredictor) -> None:
    """Each has its own candidates; the operations are the same whatever the lengths."""
    on_device, capacity = copy.deepcopy(network).to(device), 130
    history = IncrementalHistory(on_device, batch=2, kv_heads=1, device=device, kernel=True)
    rows_BGRN = rows_of(70, capacity, batch=2)
    for b, length in enumerate(lengths):
        rows_BGRN[b, ..., -(-length // 16) :] = 0
    history.start(rows_BGRN[:, :, :-1].to(device))
    history.reserve(150)
    row_BGC = torch.nn.functional.pad(rows_BGRN[:, :, -1], (0, history.capacity - capacity)).to(device)
    state_BGNC, records = history.state_BGNC, []
    for length_B in (torch.tensor([2080, 2080], device=device), torch.tensor(lengths, device=device)):
        padding_B = length_B // 5
        twin = copy.deepcopy(history)
        with Capturable() as capturable:
            twin.observe_row(row_BGC)
            found = twin.predict_ahead(2, 32, length_B, padding_B, capacity)
        records.append(capturable.record)
    assert records[0] == records[1]
    twin.check_integrity()
    assert history.state_BGNC is state_BGNC
    found = found.cpu()
    window_BGNC = twin.state_BGNC.cpu()
    for b, length in enumerate(lengths):
        first, last = length // 5 // 16 + 2, max(0, length + 1 - 32) // 16
        inside = torch.zeros(capacity, dtype=torch.bool)
        if first < last:
            inside[first:last] = True
            part_BGNC = window_BGNC[b : b + 1, :, first:last]
            with torch.no_grad():
                exact = copy.deepcopy(network).double()(part_BGNC)[0]
                own = float((copy.deepcopy(network).half()(part_BGNC)[0] - exact).abs().max())
            assert float((found[b, :, first:last] - exact).abs().max()) <= 2 * own + 2e-5
        assert torch.equal(found[b, 0].isfinite(), inside)


@pytest.mark.slow
def test_sums_lose_what_they_took(device: str, network: WindowPredictor) -> None:
    """Once the prompt's rows have left, the same rows make the same sums, but for the last bits of fp64."""
    history = IncrementalHistory(copy.deepcopy(network).to(device), batch=1, kv_heads=1, device=device, kernel=True)
    history.start(rows_of(64, 12).to(device))
    same = rows_of(1, 12, seed=5)[:, :, 0].to(device)
    for _ in range(64):
        history.push(same)
    before = history._sum_BGCN.clone()
    for step in range(70):
        history.push(same if step >= 5 else rows_of(1, 12, seed=step)[:, :, 0].to(device))
        # The last of the other rows leaves 64 steps after it came.
        equal = torch.allclose(history._sum_BGCN, before, rtol=0, atol=1e-12)
        assert equal == (step >= 68)


def test_where_there_is_no_kernel(network: WindowPredictor) -> None:
    short = type("Short", (WindowPredictor,), {"channels": 24, "rows": 24})()
    with emulated_gpu():
        assert why_no_kernel(network, "cpu") is None
        assert why_no_kernel(short, "cpu") == "no kernel for a window of 24 rows, 16 maps and 32 features"
    assert why_no_kernel(network, "cpu") == "the predictor's kernels need a GPU, the device is cpu"
    with pytest.raises(ConfigError, match="kernel=True is not possible: the predictor's kernels need a GPU"):
        IncrementalHistory(network, batch=1, kv_heads=1, device="cpu", kernel=True)


def test_wrong_arguments_are_named(network: WindowPredictor) -> None:
    packed = [x.detach() for x in ops.pack_network(network.conv1, network.conv2, network.conv3)]
    window_BGNR = torch.zeros(1, 2, 20, 64, dtype=torch.float16)
    sum_BGCN = torch.zeros(1, 2, 32, 20, dtype=torch.float64)
    good = [torch.zeros(1, 2, 20), window_BGNR, sum_BGCN, *packed]
    cases = {
        "row_BGN: expected torch.float32 [1, 2, 20]": (0, torch.zeros(1, 2, 18)),
        "window_BGNR: expected torch.float16 [1, 2, 20, 64]": (1, window_BGNR.float()),
        "sum_BGCN: expected torch.float64 [1, 2, 32, 20]": (2, sum_BGCN[..., :19]),
        "weight: expected torch.float16 [4608]": (3, packed[0].float()),
        "rest: expected torch.float32 [225]": (4, packed[1][1:]),
    }
    with pytest.raises(ValueError, match="window_BGNR is on cpu, expected a GPU"):
        ops.push_window(*good)
    with emulated_gpu():
        for message, (place, bad) in cases.items():
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                ops.push_window(*good[:place], bad, *good[place + 1 :])
        good, length_B = [20, 0, 16, 16, torch.tensor([300]), None], torch.tensor([300])
        cases = {
            "window_BGNR has room for 20 blocks, expected at least 21": (0, 21),
            "first is -1 and block_size 16": (1, -1),
            "length_B: expected torch.int64 [1]": (4, length_B.int()),
            "padding_B: expected torch.int64 [1]": (5, length_B.repeat(2)),
        }
        for message, (place, bad) in cases.items():
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                ops.score_window(window_BGNR, sum_BGCN, *packed, *good[:place], bad, *good[place + 1 :])


def test_torch_compile_knows_the_shapes(device: str, network: WindowPredictor) -> None:
    packed = [x.detach().to(device) for x in ops.pack_network(network.conv1, network.conv2, network.conv3)]
    window_BGNR = torch.rand(1, 1, 20, 64, device=device).half()
    sum_BGCN = torch.rand(1, 1, 32, 20, device=device, dtype=torch.float64)
    tests = ("test_schema", "test_faketensor")
    arguments = (torch.rand(1, 1, 20, device=device), window_BGNR, sum_BGCN, *packed)
    torch.library.opcheck(ops.push_window, arguments, test_utils=tests)
    arguments = (window_BGNR, sum_BGCN, *packed, 18, 2, 32, 16, torch.tensor([290], device=device))
    torch.library.opcheck(ops.score_window, arguments, test_utils=tests)
