"""Patterns on maps made to show them: each is told, with its period, whatever pieces the map is seen in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_predictor.eval.analysis.patterns import CLASSES, MapSums, Measures, Part, most_common
from attention_predictor.offload.blocks.selection import Selection

STEPS, LENGTH, BLOCK = 96, 2048, 16
SELECTION = Selection(budget=512, block_size=BLOCK, sink=64, recent=64)


def mapped(far_QT: Tensor, far_share: float = 0.6) -> Tensor:
    """A causal map ``[1, 1, Q, L]``: this beyond sink and recent, the rest of the mass on the first and last token."""
    position_Q1 = torch.arange(LENGTH - STEPS, LENGTH)[:, None]
    token_T = torch.arange(LENGTH)
    far = (token_T >= 64) & (token_T < (position_Q1 + 1 - 64) // BLOCK * BLOCK)
    map_QT = far_QT * far
    map_QT = map_QT / map_QT.sum(-1, keepdim=True).clamp_min(1e-9) * far_share
    map_QT[:, 0] += (1 - far_share) / 2
    map_QT[torch.arange(STEPS), position_Q1[:, 0]] += (1 - far_share) / 2
    return map_QT[None, None]


def measured(map_BHQT: Tensor, piece: int = 500) -> Measures:
    padded = torch.nn.functional.pad(map_BHQT, (0, -map_BHQT.shape[-1] % BLOCK))
    part = Part(padded.unflatten(-1, (-1, BLOCK)).sum(-1), map_BHQT.shape[-1], SELECTION)
    sums = MapSums(part)
    for start in range(0, map_BHQT.shape[-1], piece):
        sums.add(start, part.cut(start, map_BHQT[..., start : start + piece]))
    return sums.measures()[0][0]


def noise(seed: int = 0) -> Tensor:
    """A little mass everywhere, different at every step."""
    return 1e-4 * torch.rand(STEPS, LENGTH, generator=torch.Generator().manual_seed(seed))


def vertical() -> Tensor:
    map_QT = noise()
    map_QT[:, [150, 477, 904, 1333]] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    return map_QT


def diagonal(*distances: int) -> Tensor:
    map_QT, step = noise(), torch.arange(STEPS)
    for distance in distances:
        map_QT[step, LENGTH - STEPS + step - distance] += 1.0
    return map_QT


def jumping(tokens: int) -> Tensor:
    """At each step that many tokens, drawn anew."""
    far = LENGTH - STEPS - 2 * 64  # of these, all steps know all
    drawn = torch.rand(STEPS, far, generator=torch.Generator().manual_seed(3)).topk(tokens, dim=-1).indices
    return noise().scatter(-1, 64 + drawn, 1.0)


def returning(period: int) -> Tensor:
    """Columns in turn, back after a period of steps."""
    map_QT, step = noise(), torch.arange(STEPS)
    map_QT[step, 128 + 64 * (step % period)] += 1.0
    return map_QT


def test_vertical_lines_are_re_access():
    found = measured(mapped(vertical()))
    assert found.pattern == "re-access"
    assert found.part == "far"
    assert found.far_mass == pytest.approx(0.6, abs=1e-4)
    assert found.vertical > 0.9
    assert abs(found.diagonal) < 0.1
    assert found.period is None


@pytest.mark.parametrize("distances", [(300,), (300, 711), (1500,)])
def test_diagonals_are_sequential(distances):
    found = measured(mapped(diagonal(*distances)))
    assert found.pattern == "sequential"
    assert found.diagonal > 0.9
    assert abs(found.vertical) < 0.1


@pytest.mark.parametrize("period", [7, 17, 64, 200])
def test_parallel_diagonals_are_seasonal(period):
    found = measured(mapped(diagonal(*range(300, 300 + 5 * period, period))))
    assert found.pattern == "seasonal"
    assert found.period == (period, "tokens")
    assert found.echo == pytest.approx(0.8, abs=0.02)  # four of five lines have one a period on


@pytest.mark.parametrize("period", [5, 12, 30])
def test_columns_that_come_back_are_seasonal(period):
    found = measured(mapped(returning(period)))
    assert found.pattern == "seasonal"
    assert found.period == (period, "steps")
    assert abs(found.vertical) < 0.1


def test_few_tokens_that_jump_are_retrieval():
    found = measured(mapped(jumping(4)))
    assert found.pattern == "retrieval"
    assert 1 / found.focus == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("far", [jumping(200), torch.ones(STEPS, LENGTH)], ids=["many tokens", "evenly spread"])
def test_the_rest_is_unpredictable(far):
    found = measured(mapped(far))
    assert found.pattern == "unpredictable"
    assert max(found.vertical, found.diagonal) < 0.1


def test_what_is_broad_is_no_line():
    """Two even rows have everything in common, token by token: by chance, not by a pattern."""
    found = measured(mapped(torch.ones(STEPS, LENGTH)))
    assert found.chance > 0.95
    assert max(found.vertical, found.diagonal) < 0.1


def test_a_head_that_looks_at_sink_or_neighbours_alone_is_judged_by_them():
    at_sink, at_last = torch.zeros(2, 1, 1, STEPS, LENGTH)
    at_sink[..., 0] = 1.0
    step = torch.arange(STEPS)
    at_last[0, 0, step, LENGTH - STEPS + step - 1] = 1.0
    assert (measured(at_sink).part, measured(at_sink).pattern) == ("all", "re-access")
    assert (measured(at_last).part, measured(at_last).pattern) == ("all", "sequential")
    # As much of it elsewhere, and that is what counts.
    assert measured(mapped(jumping(4), far_share=0.15)).pattern == "retrieval"
    assert measured(mapped(jumping(4), far_share=0.05)).part == "all"


@pytest.mark.parametrize("far", [vertical(), diagonal(300, 360, 420, 480), jumping(4), returning(12)])
@pytest.mark.parametrize("piece", [64, 333, LENGTH])
def test_pieces_make_no_difference(far, piece):
    whole, pieces = measured(mapped(far), LENGTH), measured(mapped(far), piece)
    for name in Measures.__dataclass_fields__:
        one, other = getattr(whole, name), getattr(pieces, name)
        assert one == (other if isinstance(one, str) else pytest.approx(other, abs=1e-5)), name


def test_mass_decides_which_steps_count():
    """A head that looks back at a few steps alone is judged by these, not by the noise of the others."""
    map_BHQT = mapped(vertical())
    map_BHQT[:, :, :48] = mapped(noise(), far_share=0.01)[:, :, :48]
    assert measured(map_BHQT).pattern == "re-access"


def test_heads_and_sequences_stay_apart():
    maps = torch.stack([mapped(far)[0] for far in (vertical(), diagonal(300), jumping(4), returning(12))])
    map_BHQT = maps.view(2, 2, STEPS, LENGTH)
    part = Part(map_BHQT.unflatten(-1, (-1, BLOCK)).sum(-1), LENGTH, SELECTION)
    sums = MapSums(part)
    sums.add(0, part.cut(0, map_BHQT))
    found = [[one.pattern for one in of_heads] for of_heads in sums.measures()]
    assert found == [["re-access", "sequential"], ["retrieval", "seasonal"]]


def test_few_steps_have_no_period():
    far = returning(2)[:4]
    position_Q = torch.arange(LENGTH - 4, LENGTH)
    map_BHQT = (far * (torch.arange(LENGTH) <= position_Q[:, None]))[None, None]
    found = measured(map_BHQT / map_BHQT.sum(-1, keepdim=True))
    assert found.back == 0
    assert found.back_period == 0


def test_the_most_common_pattern():
    assert most_common(["retrieval", "sequential", "retrieval"]) == "retrieval"
    assert most_common(["retrieval", "sequential"]) == "sequential"  # as the classes are ordered
    assert set(CLASSES) == {"re-access", "sequential", "seasonal", "retrieval", "unpredictable"}
