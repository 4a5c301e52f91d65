"""The incremental evaluation of the published network against the network over its whole window, on the same rows."""

from __future__ import annotations

import copy

import pytest
import torch
from histories import predicted
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_predictor.errors import IntegrityError
from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.incremental import IncrementalHistory
from attention_predictor.predictor.window import WindowPredictor


def make_network(rows: int = 64, seed: int = 0) -> WindowPredictor:
    torch.manual_seed(seed)
    network = type("Network", (WindowPredictor,), {"channels": rows, "rows": rows})().eval()
    with torch.no_grad():
        network.conv3.weight.mul_(10)  # larger scores: their differences are what is looked at
    return network


def pair(network: WindowPredictor, batch: int = 1, kv_heads: int = 2) -> tuple[ScoreHistory, IncrementalHistory]:
    shape = {"batch": batch, "kv_heads": kv_heads, "device": "cpu"}
    return ScoreHistory(network, **shape), IncrementalHistory(network, **shape)


def make_row(blocks: int, generator: torch.Generator, batch: int = 1, kv_heads: int = 2) -> torch.Tensor:
    """Heavy-tailed scores."""
    return torch.rand(batch, kv_heads, blocks, generator=generator) ** 8


def agree(windowed: ScoreHistory, incremental: IncrementalHistory, first: int, last: int) -> None:
    if windowed.n_blocks == 0:
        return
    expected, found = predicted(windowed, first, last), predicted(incremental, first, last)
    assert torch.equal(expected.isinf(), found.isinf())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


RUNS = [(64, 1000, False), (64, 1000, True), (24, 1000, False), (5, 300, True), (8, 300, False), (3, 20, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "steps", "resets"), [*RUNS, (97, 200, False)])
def test_equal_over_many_steps_with_blocks_arriving(rows, steps, resets):
    generator = torch.Generator().manual_seed(1)
    windowed, incremental = pair(make_network(rows))
    prompt = make_row(40, torch.Generator().manual_seed(2))[:, :, None].repeat(1, 1, rows // 2 + 1, 1)
    for history in (windowed, incremental):
        history.start(prompt)
    blocks = 40
    for step in range(steps):
        if resets and step % 190 == 180:  # as after rejected drafts, and as in a further conversation
            blocks -= 3
            for history in (windowed, incremental):
                history.crop(blocks)
        elif resets and step % 400 == 300:
            blocks = 40
            for history in (windowed, incremental):
                history.start(prompt)
        blocks += step % 16 == 0
        row = make_row(blocks, generator)
        if step % 5 == 0:
            row *= 0.1  # as if from another source: a calibrated row among estimates
        windowed.push(row)
        incremental.push(row)
        if step % 7 == 0 or step > steps - 10:
            agree(windowed, incremental, 4, blocks - 4)
    agree(windowed, incremental, 0, blocks)
    incremental.check_integrity()


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_order_of_operations(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    windowed, incremental = pair(make_network(data.draw(st.sampled_from([6, 64]))), batch=2)
    both = [windowed, incremental]
    blocks = data.draw(st.integers(1, 30))
    for operation in data.draw(
        st.lists(st.sampled_from(["start", "push", "grow", "crop", "index", "copy", "extend"]), max_size=12)
    ):
        if operation == "start":
            blocks = data.draw(st.integers(1, 30))
        elif operation in ("grow", "extend"):
            blocks += data.draw(st.integers(0, 70))
        row = make_row(blocks, generator, batch=len(windowed._state_BGNC))
        keep = data.draw(st.integers(0, windowed.n_blocks))
        for number, history in enumerate(both):
            if operation == "start":
                history.start(row[:, :, None])
            elif operation in ("push", "grow"):
                history.push(row)
            elif operation == "extend":
                history.extend(row[:, :, None].repeat(1, 1, 3, 1))
            elif operation == "crop":
                history.crop(keep)
            elif operation == "index":
                history.index(torch.tensor([1, 0, 1]))
            elif operation == "copy":
                both[number] = copy.deepcopy(history)
                history.push(row * 0.5)  # the copy owns its state
        windowed, incremental = both
        if operation == "crop":
            blocks = max(keep, 1)
        incremental.check_integrity()
        low = data.draw(st.integers(0, windowed.n_blocks))
        agree(windowed, incremental, low, data.draw(st.integers(low, windowed.n_blocks)))


def test_state_size_and_integrity():
    windowed, incremental = pair(make_network())
    for history in (windowed, incremental):
        history.start(make_row(50, torch.Generator().manual_seed(0))[:, :, None])
    assert windowed.nbytes == 2 * 64 * 64 * 2  # KV heads, capacity in blocks, rows, bytes
    assert incremental.nbytes == windowed.nbytes + 2 * 64 * 32 * 8
    incremental._sum_BGCN[0, 0, 0, 20] += 1.0
    with pytest.raises(IntegrityError, match="feature sums differ"):
        incremental.check_integrity()
