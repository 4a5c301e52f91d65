"""The history's row and the default predictor by kernels, against torch operations on the same inputs.

Suffixes: B sequences, G KV heads, H query heads, S slots, N blocks, C state channels.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from capturable import Capturable
from emulated import emulated_gpu
from histories import predicted
from torch import Tensor

from attention_predictor.csrc import binding, ops
from attention_predictor.errors import ConfigError
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.predictor.history import ScoreHistory, candidates_of, row_of_logits, why_no_kernel
from attention_predictor.predictor.model import AttentionPredictor, ExponentialAverage, FilterPredictor

pytestmark = pytest.mark.usefixtures("exact_matmul")
C = FilterPredictor.channels


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "emulated": tensors on the CPU, and the GPU's kernels (tests/emulation)."""
    with emulated_gpu() if request.param == "emulated" else nullcontext():
        yield "cpu" if request.param == "emulated" else request.param


@pytest.fixture(scope="module")
def trained() -> FilterPredictor:
    predictor = AttentionPredictor.from_pretrained("default")
    assert isinstance(predictor, FilterPredictor)
    return predictor


# Observing


def logits_case(B: int, G: int, H: int, S: int, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peaks, blocks in slots (some empty), the slots' peaks, totals; some logits, and all of one head, are −inf."""
    generator = torch.Generator().manual_seed(N + S)
    peak_BHN = 4 * torch.randn(B, H, N, generator=generator)
    peak_BHN[:, :, ::5] = -torch.inf
    block_BGS = torch.stack([torch.randperm(N, generator=generator) for _ in range(B * G)])[:, :S].view(B, G, -1)
    block_BGS = torch.cat([block_BGS, block_BGS.new_full((B, G, S - block_BGS.shape[2]), -1)], -1)
    block_BGS[..., 1::4] = -1
    slot_peak_BHS = 4 * torch.randn(B, H, S, generator=generator)
    slot_peak_BHS[..., ::7] = -torch.inf
    total_BH = torch.logaddexp(peak_BHN.logsumexp(-1), slot_peak_BHS.logsumexp(-1))
    peak_BHN[0, 0], slot_peak_BHS[0, 0], total_BH[0, 0] = -torch.inf, -torch.inf, -torch.inf
    return peak_BHN, block_BGS, slot_peak_BHS, total_BH


def literal_row(peak_BHN: Tensor | None, block_BGS: Tensor, slot_peak_BHS: Tensor, total_BH: Tensor, N: int) -> Tensor:
    (B, H, _), G = slot_peak_BHS.shape, block_BGS.shape[1]
    row_BGN = torch.zeros(B, G, N, dtype=total_BH.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            logits = torch.full((N,), -torch.inf) if peak_BHN is None else peak_BHN[b, h].clone()
            for s, n in enumerate(block_BGS[b, g].tolist()):
                if n >= 0:
                    logits[n] = slot_peak_BHS[b, h, s]
            share_N = torch.where(logits == -torch.inf, 0.0, (logits - total_BH[b, h]).exp())
            row_BGN[b, g] = torch.maximum(row_BGN[b, g], share_N)
    return row_BGN


def literal_state(predictor: FilterPredictor, state_BGNC: Tensor, row_BGN: Tensor) -> Tensor:
    """The state after one more row, in the precision of its arguments."""
    eps, decay_F = predictor.eps.to(row_BGN), predictor.logit_decay.to(row_BGN).sigmoid()
    log_BGN1 = (torch.log1p(row_BGN / eps) / torch.log1p(1 / eps))[..., None]
    average_BGNF, _, peak_BGNP = state_BGNC.split([8, 1, 5], -1)
    fallen_BGNP = peak_BGNP - predictor.drop.to(row_BGN)
    return torch.cat(
        [decay_F * average_BGNF + (1 - decay_F) * log_BGN1, log_BGN1, fallen_BGNP.maximum(log_BGN1)], dim=-1
    )


SHAPES = [
    {"B": 2, "G": 2, "H": 8, "S": 13, "N": 130},
    {"B": 1, "G": 1, "H": 1, "S": 1, "N": 1},
    {"B": 1, "G": 3, "H": 6, "S": 40, "N": 127},
    {"B": 1, "G": 1, "H": 7, "S": 260, "N": 300},  # more slots than threads
    {"B": 1, "G": 2, "H": 4, "S": 5, "N": 128},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("estimated", [True, False])
def test_row_and_state(device: str, shape: dict[str, int], estimated: bool, trained: FilterPredictor) -> None:
    """Errors, against fp64, at most twice those of torch operations in fp32; what is not known yet stays as it is."""
    N, room = shape["N"], 320
    peak_BHN, *slots = logits_case(**shape)
    logits = (peak_BHN if estimated else None, *slots)
    generator = torch.Generator().manual_seed(0)
    state_BGNC = torch.rand(shape["B"], shape["G"], room, C, generator=generator)

    exact_row = literal_row(*(x if x is None or x.dtype == torch.int64 else x.double() for x in logits), N)
    exact = literal_state(trained, state_BGNC[:, :, :N].double(), exact_row).detach()
    row_BGN = row_of_logits(*logits, N)
    with torch.no_grad():
        by_torch = trained.observe(state_BGNC[:, :, :N].clone(), row_BGN)

    packed = copy.deepcopy(trained).to(device).packed()
    found, found_row = state_BGNC.to(device), torch.full(row_BGN.shape, torch.nan, device=device)
    on_device = [x if x is None else x.to(device) for x in logits]
    ops.observe_row(*on_device, None, found, packed.fold_C, packed.eps, 16, 16 * N - 3, None, found_row)
    found, found_row = found.cpu(), found_row.cpu()
    assert torch.equal(found[:, :, N:], state_BGNC[:, :, N:])
    for one, reference, truth in ((found_row, row_BGN, exact_row), (found[:, :, :N], by_torch, exact)):
        own = float((reference.double() - truth).abs().max())
        assert float((one.double() - truth).abs().max()) <= 2 * own + 1e-7

    folded = state_BGNC.to(device)
    ops.fold_rows(row_BGN[:, :, None].contiguous().to(device), folded, packed.fold_C, packed.eps, False)
    torch.testing.assert_close(folded.cpu(), found, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("B", "G", "R", "N"), [(1, 1, 1, 1), (2, 2, 64, 131), (1, 3, 7, 300)])
def test_many_rows_at_once(device: str, B: int, G: int, R: int, N: int, trained: FilterPredictor) -> None:
    """A prompt's rows, and further ones, against the closed form; what was in the state before a start is gone."""
    generator = torch.Generator().manual_seed(R)
    rows_BGRN = torch.rand(B, G, R, N, generator=generator) ** 6
    predictor = copy.deepcopy(trained).to(device)
    by_kernel = ScoreHistory(predictor, batch=B, kv_heads=G, device=device, kernel=True)
    by_torch = ScoreHistory(predictor, batch=B, kv_heads=G, device=device)
    more_BGRN = torch.rand(B, G, 3, N + 2, generator=generator) ** 6
    for history in (by_kernel, by_torch):
        history.start(torch.rand(B, G, 2, N + 9, generator=generator).to(device))
        history.start(rows_BGRN.to(device))
        history.check_integrity()
    exact = torch.zeros(B, G, N, C, dtype=torch.float64)
    for _ in range(4000):  # as if for ever
        exact = literal_state(trained, exact, rows_BGRN[:, :, 0].double()).detach()
    for row_BGN in rows_BGRN.double().unbind(2):
        exact = literal_state(trained, exact, row_BGN).detach()
    own = float((by_torch.state_BGNC[:, :, :N].cpu() - exact).abs().max())
    assert float((by_kernel.state_BGNC[:, :, :N].cpu() - exact).abs().max()) <= 2 * own + 1e-6
    for history in (by_kernel, by_torch):
        history.extend(more_BGRN.to(device))
        history.check_integrity()
    room = min(by_kernel.state_BGNC.shape[2], by_torch.state_BGNC.shape[2])
    torch.testing.assert_close(by_kernel.state_BGNC[:, :, :room], by_torch.state_BGNC[:, :, :room], atol=2e-6, rtol=0)


@pytest.mark.parametrize("length", [1, 16, 17, 2047, 2049, 16 * 140])
def test_row_up_to_lengths_on_the_device(device: str, length: int, trained: FilterPredictor) -> None:
    """The capacity sizes the grid; columns of the row may be more or fewer than the state has room for."""
    room, columns, lengths = 150, 140, [length, 700]
    packed = copy.deepcopy(trained).to(device).packed()
    state_BGNC = torch.rand(2, 2, room, C, device=device)
    arguments = (packed.fold_C, packed.eps, 16)
    logits = [x.to(device) for x in logits_case(2, 2, 4, 30, columns)]
    for b, n_blocks in enumerate(-(-one // 16) for one in lengths):
        logits[0][b, ..., n_blocks:] = torch.nan  # a kernel left it as it came
        logits[1][b] = logits[1][b].masked_fill(logits[1][b] >= n_blocks, -1)
    by_device = state_BGNC.clone()
    ops.observe_row(*logits, None, by_device, *arguments, 16 * columns, torch.tensor(lengths, device=device), None)
    for b, one in enumerate(lengths):
        n_blocks, by_host = -(-one // 16), state_BGNC[b : b + 1].clone()
        ops.observe_row(*(x[b : b + 1] for x in logits), None, by_host, *arguments, one, None, None)
        assert torch.equal(by_device[b : b + 1], by_host)
        assert torch.equal(by_device[b, :, n_blocks:], state_BGNC[b, :, n_blocks:])
        assert not torch.equal(by_device[b, :, n_blocks - 1], state_BGNC[b, :, n_blocks - 1])


def test_a_total_in_two_parts(device: str, trained: FilterPredictor) -> None:
    """What was attended to and the rest, also where one of them is nothing."""
    peak_BHN, block_BGS, slot_peak_BHS, total_BH = (x.to(device) for x in logits_case(2, 2, 8, 13, 130))
    share_BH = torch.linspace(0, 1, total_BH.numel(), device=device).view_as(total_BH)  # 0 and 1 included
    parts = (total_BH + share_BH.log(), total_BH + (1 - share_BH).log())
    packed = copy.deepcopy(trained).to(device).packed()
    found, wanted = torch.zeros(2, 2, 130, C, device=device), torch.zeros(2, 2, 130, C, device=device)
    arguments = (packed.fold_C, packed.eps, 16, 16 * 130, None, None)
    ops.observe_row(peak_BHN, block_BGS, slot_peak_BHS, *parts, found, *arguments)
    ops.observe_row(peak_BHN, block_BGS, slot_peak_BHS, total_BH, None, wanted, *arguments)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


# Predicting


def states(B: int, G: int, N: int, steps: int = 12, seed: int = 0) -> Tensor:
    """States after rows as real ones are: most of the mass on few blocks, which stay for a while; a sweep; noise."""
    generator = torch.Generator().manual_seed(seed)
    predictor, base = FilterPredictor(), torch.randn(B, G, N, generator=generator)
    rows = []
    for step in range(steps):
        logits = 2.5 * base + 0.7 * torch.randn(B, G, N, generator=generator)
        logits[..., (7 * step + N // 3) % N] += 8.0
        rows.append(logits.softmax(-1))
    return predictor.start(torch.stack(rows, 2)).detach()


@pytest.mark.parametrize(
    ("G", "N", "first", "last"),
    [
        (1, 1, 0, 1),
        (1, 2, 0, 2),
        (1, 7, 2, 5),
        (1, 58, 0, 58),  # a tile of two warps
        (1, 60, 3, 59),
        (2, 117, 57, 60),  # around where tiles meet
        (4, 122, 4, 118),  # a tile of four
        (4, 262, 0, 262),
        (4, 2100, 700, 2000),  # many tiles, some of which have no candidates
    ],
)
def test_scores(
    device: str, G: int, N: int, first: int, last: int, trained: FilterPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors against fp64, at most twice those of the network in half precision; `-inf` where there is no candidate."""
    monkeypatch.setattr(binding, "multiprocessors", lambda _: 4)  # as few as are filled here: tiles of either size
    state_BGNC = states(1, G, N)
    with torch.no_grad():
        exact = copy.deepcopy(trained).double()(state_BGNC[:, :, first:last].double())
        in_half = copy.deepcopy(trained).half()(state_BGNC[:, :, first:last].half())
    history = ScoreHistory(copy.deepcopy(trained).to(device), batch=1, kv_heads=G, device=device, kernel=True)
    history.start(torch.zeros(1, G, 1, N, device=device))
    history.state_BGNC[:, :, :N] = state_BGNC
    found = predicted(history, first, last).cpu()
    assert found.shape == (1, G, N)
    outside = torch.ones(N, dtype=torch.bool)
    outside[first:last] = False
    assert (found[..., outside] == -torch.inf).all()
    own = float((in_half.double() - exact).abs().max())
    assert float((found[..., first:last].double() - exact).abs().max()) <= 2 * own + 1e-4


def test_any_weights(device: str) -> None:
    """Each weight in its place: random ones of every layer, larger than trained ones."""
    torch.manual_seed(0)
    predictor = FilterPredictor()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.mul_(2).add_(0.05 * torch.randn_like(parameter))
        state_BGNC = torch.rand(1, 2, 66, C)
        exact = copy.deepcopy(predictor).double()(state_BGNC.double())
        in_half = copy.deepcopy(predictor).half()(state_BGNC.half())
    packed = predictor.to(device).packed()
    arguments = (packed.weight, packed.bias, 66, 0, 1, 1, torch.tensor([66], device=device))
    found = ops.predict_blocks(state_BGNC.to(device), *arguments).cpu()
    own = float((in_half.double() - exact).abs().max())
    assert float((found.double() - exact).abs().max()) <= 2 * own + 1e-4


@pytest.mark.parametrize("sink", [0, 5, 64])
@pytest.mark.parametrize("recent", [0, 1, 16, 60])
def test_candidates_of_the_next_step(device: str, sink: int, recent: int, trained: FilterPredictor) -> None:
    """What `Selection` says of the next step, as far as blocks exist, by the kernel and by `candidates_of`."""
    predictor = copy.deepcopy(trained).to(device)
    packed, selection = predictor.packed(), Selection(256, 16, sink, recent)
    state_BGNC, padding_B = torch.rand(3, 1, 20, C, device=device), torch.tensor([0, 5, 40], device=device)
    for length in (1, 15, 16, 17, 75, 79, 80, 81, 160, 300):
        first, last = selection.candidates(length + 1)
        last = min(last, selection.n_blocks(length))
        length_B = torch.tensor([length, length, 300], device=device)
        bounds = (sink // 16, recent, 16, length_B, padding_B)
        found = ops.predict_blocks(state_BGNC, packed.weight, packed.bias, 19, *bounds)
        assert torch.equal(found[:, 0].isfinite(), candidates_of(19, *bounds))
        for sequence in (0, 1):
            assert found[sequence, 0].isfinite().nonzero()[:, 0].tolist() == list(range(first, last))


@pytest.mark.slow
def test_the_same_blocks_are_chosen(device: str, trained: FilterPredictor) -> None:
    """64 of 500 blocks after each of 10 steps: whatever differs is a tie but for rounding."""
    pair = [
        ScoreHistory(copy.deepcopy(trained).to(device), batch=1, kv_heads=2, device=device, kernel=kernel)
        for kernel in (False, True)
    ]
    generator = torch.Generator().manual_seed(3)
    base, shared = torch.randn(1, 2, 500, generator=generator), 0
    for step in range(10):
        logits = 2.5 * base + 0.7 * torch.randn(base.shape, generator=generator)
        logits[..., 100 + 9 * step : 103 + 9 * step] += 6.0
        for history in pair:
            history.push(logits.softmax(-1).to(device))
        by_torch, by_kernel = (predicted(history, 4, 495) for history in pair)
        error = float((by_torch - by_kernel)[..., 4:495].abs().max())
        assert error < 0.02 * float(by_torch[..., 4:495].std())
        wanted, chosen = (scores.topk(64, dim=-1) for scores in (by_torch, by_kernel))
        threshold = wanted.values[..., -1:] - 2 * error
        assert (by_torch.gather(-1, chosen.indices) >= threshold).all()
        shared += sum(
            len(set(one.tolist()) & set(other.tolist()))
            for one, other in zip(wanted.indices[0], chosen.indices[0], strict=True)
        )
    assert shared >= 0.995 * 10 * 2 * 64


# Histories


@pytest.mark.slow
def test_a_history_by_kernels_is_the_same_history(device: str, trained: FilterPredictor) -> None:
    """Through all that a cache does to it, blocks arriving in the middle."""
    predictor, generator = copy.deepcopy(trained).to(device), torch.Generator().manual_seed(5)
    shape = {"batch": 2, "kv_heads": 2, "device": device}
    pair = [ScoreHistory(predictor, **shape), ScoreHistory(predictor, **shape, kernel=True)]

    def rows(count: int, n_blocks: int) -> Tensor:
        return (torch.rand(2, 2, count, n_blocks, generator=generator) ** 6).to(device)

    def slots(n_blocks: int) -> list[Tensor]:
        return [x.to(device) for x in logits_case(2, 2, 4, 20, n_blocks)]

    def lengths(n_blocks: int) -> Tensor:
        return torch.full((2,), 16 * n_blocks - 5, device=device)

    operations = [
        ("start", rows(3, 62)),
        ("push", rows(1, 63)[:, :, 0]),
        ("reserve", 100),
        ("advance", 65),
        ("observe_slots", *slots(65), lengths(65)),
        ("advance", 70),
        ("observe_slots", None, *slots(70)[1:], lengths(70), slots(70)[-1]),
        ("observe_row", F.pad(rows(1, 70)[:, :, 0], (0, 58))),
        ("crop", 33),
        ("extend", rows(4, 34)),
        ("index", torch.tensor([1, 0])),
        ("crop", 0),
        ("advance", 40),
        ("observe_slots", *slots(40), lengths(40)),
    ]
    for name, *arguments in operations:
        for number, history in enumerate(pair):
            with torch.inference_mode(number == 0):
                getattr(history, name)(*arguments)
            history.check_integrity()
            if history.started:
                pair[number] = copy.deepcopy(history)
                history.push(torch.ones(2, 2, history.n_blocks, device=device))
                history.crop(0)
        by_torch, by_kernel = pair
        assert by_kernel.n_blocks == by_torch.n_blocks
        assert by_kernel.started == by_torch.started
        torch.testing.assert_close(by_kernel.state_BGNC, by_torch.state_BGNC, atol=1e-5, rtol=1e-5)
        low, high = by_torch.n_blocks // 5, by_torch.n_blocks - 2
        if low < high and by_torch.started:
            error = predicted(by_kernel, low, high)[..., low:high] - predicted(by_torch, low, high)[..., low:high]
            assert float(error.abs().max()) < 0.02


def test_steps_without_the_host(device: str, trained: FilterPredictor) -> None:
    """Steps over the room there is leave what rows of just the sequence's blocks leave; lengths decide no operation."""
    predictor = copy.deepcopy(trained).to(device)
    known, unknown = (ScoreHistory(predictor, batch=1, kv_heads=2, device=device, kernel=True) for _ in range(2))
    for history in (known, unknown):
        history.start(torch.rand(1, 2, 4, 20, generator=torch.Generator().manual_seed(1)).to(device))
    unknown.reserve(100)
    state_BGNC, packed, records = unknown.state_BGNC, unknown.packed, []
    length_B = torch.tensor([20 * 16], device=device)
    for length in range(20 * 16 - 3, 20 * 16 + 20, 5):
        n_blocks = -(-length // 16)
        peak_BHN, *slots = (x.to(device) for x in logits_case(1, 2, 4, 10, n_blocks))
        wide_BHN = F.pad(peak_BHN, (0, 90 - n_blocks), value=torch.nan)
        length_B.fill_(length)
        unknown.advance(n_blocks)
        with Capturable() as capturable:
            unknown.observe_slots(wide_BHN, *slots, length_B)
            ahead_BGN = unknown.predict_ahead(2, 32, length_B, None, 90)
        records.append(capturable.record)
        known.push(row_of_logits(peak_BHN, *slots, n_blocks))
        last = Selection(128, 16, 32, 32).candidates(length + 1)[1]
        torch.testing.assert_close(unknown.state_BGNC[:, :, :64], known.state_BGNC, atol=1e-6, rtol=0)
        torch.testing.assert_close(ahead_BGN[..., :n_blocks], predicted(known, 2, last), atol=0.01, rtol=0)
        unknown.check_integrity()
    assert all(record == records[0] for record in records)
    assert unknown.state_BGNC is state_BGNC
    assert unknown.packed is packed
    unknown.start(torch.rand(1, 2, 4, 20).to(device))
    for n_blocks in (19, 129):
        with pytest.raises(ValueError, match=rf"n_blocks must lie within 20\.\.128, got {n_blocks}"):
            unknown.advance(n_blocks)


# What is refused, and what torch.compile is told


def test_where_there_is_no_kernel(trained: FilterPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    small = type("Small", (FilterPredictor,), {"hidden": 16})()
    with emulated_gpu():
        assert why_no_kernel(trained, "cpu") is None
        assert why_no_kernel(ExponentialAverage(), "cpu") == "no kernel for the predictor 'ema'"
        assert (
            why_no_kernel(small, "cpu")
            == "no kernel for 8 filters, 14 channels, 16 hidden ones and 3 further convolutions"
        )
    assert why_no_kernel(trained, "cpu") == "the predictor's kernels need a GPU, the device is cpu"
    with pytest.raises(ConfigError, match="kernel=True is not possible: the predictor's kernels need a GPU"):
        ScoreHistory(trained, batch=1, kv_heads=1, device="cpu", kernel=True)
    state_BGNC, packed = torch.zeros(1, 1, 2, C), trained.packed()
    with pytest.raises(ValueError, match="state_BGNC is on cpu, expected a GPU"):
        ops.fold_rows(torch.zeros(1, 1, 1, 2), state_BGNC, packed.fold_C, packed.eps, False)
    with pytest.raises(ValueError, match="state_BGNC is on cpu, expected a GPU"):
        ops.predict_blocks(state_BGNC, packed.weight, packed.bias, 2, 0, 1, 1, torch.tensor([2]))


def test_wrong_arguments_are_named(trained: FilterPredictor) -> None:
    packed = trained.packed()
    state_BGNC = torch.zeros(2, 2, 10, C)
    logits = logits_case(2, 2, 4, 5, 9)
    good = [*logits, None, state_BGNC, packed.fold_C, packed.eps, 16, 140, None, None]
    cases = {
        "peak_BHN: expected torch.float32 [2, 4, 9]": (0, logits[0].half()),
        "block_BGS: expected torch.int64 [2, 2, 5]": (1, logits[1].int()),
        "slot_peak_BHS: expected torch.float32 [2, 4, 5]": (2, logits[2][:, :, :4]),
        "total_BH: expected torch.float32 [2, 4]": (3, logits[3].double()),
        "state_BGNC: expected torch.float32 [2, 2, 10, 14]": (5, torch.zeros(2, 2, 10, 13)),
        "state_BGNC has room for 9 blocks, expected an even number and at least 9": (5, torch.zeros(2, 2, 9, C)),
        "fold_C: expected torch.float32 [14]": (6, packed.fold_C[1:]),
        "rest_BH: expected torch.float32 [2, 4]": (4, logits[3][:1]),
        "length_B: expected torch.int64 [2]": (10, torch.tensor([140])),
        "row_BGN: expected torch.float32 [2, 2, 9]": (11, torch.zeros(2, 2, 8)),
        "expected heads a multiple of 2 and columns for the 10 blocks of 150 tokens; found 4 heads, 9": (9, 150),
    }
    with emulated_gpu():
        for message, (place, bad) in cases.items():
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                ops.observe_row(*good[:place], bad, *good[place + 1 :])
        arguments = (10, 0, 1, 16, torch.tensor([160, 160]))
        with pytest.raises(ValueError, match=r"^weight: expected torch.float16 \[10752\]"):
            ops.predict_blocks(state_BGNC, packed.weight.float(), packed.bias, *arguments)
        with pytest.raises(
            ValueError, match="state_BGNC has room for 8 blocks, expected an even number and at least 10"
        ):
            ops.predict_blocks(state_BGNC[:, :, :8].contiguous(), packed.weight, packed.bias, *arguments)
        with pytest.raises(ValueError, match=r"^padding_B: expected torch.int64 \[2\]"):
            ops.predict_blocks(state_BGNC, packed.weight, packed.bias, *arguments, torch.tensor([0]))


def test_torch_compile_knows_the_shapes(device: str, trained: FilterPredictor) -> None:
    packed = copy.deepcopy(trained).to(device).packed()
    logits = [x.to(device) for x in logits_case(1, 1, 2, 5, 9)]
    state_BGNC, length_B = torch.rand(1, 1, 10, C, device=device), torch.tensor([135], device=device)
    tests = ("test_schema", "test_faketensor")
    for row_BGN in (None, torch.zeros(1, 1, 9, device=device)):
        arguments = (*logits, logits[-1], state_BGNC, packed.fold_C, packed.eps, 16, 140, length_B, row_BGN)
        torch.library.opcheck(ops.observe_row, arguments, test_utils=tests)
    arguments = (logits[0][:, None, :1], state_BGNC, packed.fold_C, packed.eps, True)
    torch.library.opcheck(ops.fold_rows, arguments, test_utils=tests)
    arguments = (state_BGNC, packed.weight, packed.bias, 9, 1, 32, 16, length_B)
    torch.library.opcheck(ops.predict_blocks, arguments, test_utils=tests)


def test_what_is_packed_follows_the_parameters(trained: FilterPredictor) -> None:
    predictor = copy.deepcopy(trained)
    before = predictor.packed()
    assert predictor.packed() is before
    with torch.no_grad():
        predictor.conv1.bias.add_(1.0)
    changed = predictor.packed()
    assert torch.equal(changed.bias[:32], before.bias[:32] + 1.0)
    predictor.load_state_dict(trained.state_dict())
    assert torch.equal(predictor.packed().bias, before.bias)
    assert predictor.packed() is not before
    assert torch.equal(copy.deepcopy(predictor).packed().weight, before.weight)
    predictor.eps.fill_(1e-4)
    assert predictor.packed().eps == pytest.approx(1e-4)
    with torch.inference_mode():
        made_there = FilterPredictor()
    made_there.packed()
