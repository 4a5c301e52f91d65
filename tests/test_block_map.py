"""Maps of blocks: each letter tells mass, what was read and what would have been best; a line stays short."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny_model

from attention_predictor.eval.benchmarks.recovery.block_map import (
    BEST,
    LETTERS,
    LEVELS,
    MAP_LETTERS,
    MAP_STEPS,
    READ,
    codes_of,
    map_record,
)
from attention_predictor.eval.benchmarks.recovery.head_recovery import measure_heads
from attention_predictor.eval.harness.teacher_forcing import decode_tails, prefill
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.attach import attach


def test_codes():
    mass_GN = torch.tensor([[0.0, 2.0**-20, 2.0**-15, 0.3, 0.5, 1.0]])
    read_GN = torch.tensor([[False, False, True, False, True, True]])
    best_GN = torch.tensor([[False, False, False, True, True, True]])
    expected = [0, 0, 1 + READ, 14 + BEST, 15 + READ + BEST, 15 + READ + BEST]
    assert codes_of(mass_GN, read_GN, best_GN).tolist() == [expected]
    assert len(set(LETTERS)) == LEVELS * 4


@pytest.mark.parametrize("policy", ["oracle", "streaming", "predictor"])
@torch.no_grad()
def test_what_was_read_is_what_the_policy_chose(policy, ids):
    model = make_tiny_model()
    with attach(model, OffloadConfig(policy=policy, budget=208)) as engine:
        cache = engine.new_cache()
        prefill(model, cache, ids(500)[0].tolist(), 2)
        watched = measure_heads(cache, 3, mapped=True)
        decode_tails(model, cache, ids(12, batch=2, seed=1).tolist())
    made = map_record({number: one.maps_GN for number, one in watched.items()}, 3, 16)
    assert made["layers"] == [0, 1]
    assert made["steps"] == [3, 6, 9, 12]
    alike = []
    for of_heads in made["rows"]:
        for of_steps in of_heads:
            assert [len(row) for row in of_steps] == [32] * 4  # 503 to 512 tokens
            for row in of_steps:
                codes = [LETTERS.index(letter) for letter in row]
                read = {block for block, code in enumerate(codes) if code & READ}
                best = {block for block, code in enumerate(codes) if code & BEST}
                assert len(read) == len(best) == 13
                assert {0, 1, 2, 3, 28, 29, 30, 31} <= read & best  # sink and recent
                alike.append(read == best)
                # A level is half of the mass or more, and all levels together at most all of it.
                assert sum(2.0 ** ((code % LEVELS) - LEVELS) for code in codes if code % LEVELS) <= 1
    assert all(alike) == (policy == "oracle")


@pytest.mark.parametrize(("layers", "heads", "blocks"), [(2, 2, 40), (32, 8, 64), (40, 8, 8192)])
def test_a_line_stays_short(layers, heads, blocks):
    maps = {layer: [torch.zeros(heads, blocks, dtype=torch.uint8)] * 30 for layer in range(layers)}
    made = map_record(maps, 2, 16)
    assert len(made["steps"]) == min(MAP_STEPS, max(1, MAP_LETTERS // (heads * blocks)))
    assert sum(len(row) for of_heads in made["rows"] for rows in of_heads for row in rows) <= max(
        MAP_LETTERS, heads * blocks
    )
    assert made["layers"] == sorted(set(made["layers"]))
    assert made["steps"] == sorted(set(made["steps"]))
    assert len(made["rows"]) == len(made["layers"])
