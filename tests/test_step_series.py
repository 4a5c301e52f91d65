"""Figures over steps: sums as the engine's own, a series that stays short, means over samples that came as far."""

from __future__ import annotations

import pytest
import torch
from test_graph import emulated  # noqa: F401  # a fixture
from tiny_models import make_tiny_model

from attention_predictor.eval.harness.step_series import MOST, StepSeries, mean_series, record_steps
from attention_predictor.eval.harness.teacher_forcing import decode_tails, prefill
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.attach import attach


def figures(engine) -> dict[str, int]:
    stats = engine.stats
    return {"wanted": stats.wanted_blocks, "hit": stats.hit_blocks, "fetched": stats.fetched_bytes}


@pytest.mark.parametrize("policy", ["predictor", "quest", "streaming"])
@torch.no_grad()
def test_steps_add_up_to_what_the_engine_counts(policy, ids):
    model, tails = make_tiny_model(), ids(10, batch=2, seed=1).tolist()
    with attach(model, OffloadConfig(policy=policy, budget=208, reserve=0)) as engine:
        with record_steps(model, engine) as series:
            counted = {"wanted": 0, "hit": 0, "fetched": 0}  # by steps that have one before them
            for _ in range(2):
                cache = engine.new_cache()
                prefill(model, cache, ids(400)[0].tolist(), 2)
                decode_tails(model, cache, [tail[:1] for tail in tails])
                before = figures(engine)
                decode_tails(model, cache, [tail[1:] for tail in tails])
                counted = {name: counted[name] + now - before[name] for name, now in figures(engine).items()}
        assert series.steps == engine.stats.steps - 2 == 18
        assert {name: sum(values) for name, values in series.sums.items()} == counted
        assert counted["hit"] > 0
        assert (counted["fetched"] > 0) == (policy != "streaming")  # which reads what it has just written
        assert not model._forward_hooks
    record = series.record()
    assert len(record["hit_rate"]) == len(record["fetched_bytes"]) == 18
    assert sum(record["fetched_bytes"]) == pytest.approx(counted["fetched"], abs=18)


def test_no_series_of_the_stock_model(ids):
    model = make_tiny_model()
    with record_steps(model, None) as series:
        model(ids(20))
        assert not model._forward_hooks
    assert series.steps == 0


@pytest.mark.slow
def test_captured_steps_have_the_same_series(emulated, ids):  # noqa: F811
    model, records = make_tiny_model(), []
    for prefetch in ("thread", "graph"):
        settings = {"budget": 96, "sink": 32, "recent": 32, "slab_blocks": 4, "prefetch": prefetch}
        with attach(model, OffloadConfig(**settings)) as engine, record_steps(model, engine) as series:
            model.generate(ids(245), do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=0)
            assert not engine.stats.fallbacks
            assert engine.stats.steps == series.steps + 1 == 19
        records.append(series.record())
    assert records[0]["hit_rate"] == pytest.approx(records[1]["hit_rate"], abs=0.1)
    assert sum(records[0]["fetched_bytes"]) == pytest.approx(sum(records[1]["fetched_bytes"]), rel=0.05)
    assert min(records[1]["hit_rate"]) < 1


@pytest.mark.parametrize("steps", [1, MOST - 1, MOST, MOST + 1, 5 * MOST + 3])
def test_a_series_stays_short_and_keeps_its_sums(steps):
    series = StepSeries()
    for step in range(steps):
        series.add(wanted=4, hit=step % 2, fetched=step)
    record = series.record()
    assert record["steps"] == steps
    assert len(record["fetched_bytes"]) == -(-steps // record["stride"]) <= MOST
    assert sum(series.sums["fetched"]) == steps * (steps - 1) / 2
    for place, value in enumerate(record["fetched_bytes"]):
        first = place * record["stride"]
        last = min(first + record["stride"], steps) - 1
        assert value == round((first + last) / 2)


def test_mean_over_samples():
    short = StepSeries()
    for hit in (1, 3):
        short.add(wanted=4, hit=hit, fetched=100)
    long = StepSeries(stride=2)
    for _ in range(6):
        long.add(wanted=0, hit=0, fetched=300)
    records = [short.record(), long.record()]
    assert mean_series(records, "hit_rate") == [(1, 0.5)]  # nothing was read in the other
    assert mean_series(records, "fetched_bytes") == [(1, 200), (3, 300), (5, 300)]
    assert mean_series([], "hit_rate") == []
