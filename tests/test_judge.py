"""Judging rules: what captured steps have done counts too."""

from __future__ import annotations

import pytest
from test_graph import emulated  # noqa: F401
from tiny_models import make_tiny_model

from attention_predictor.documents import Excerpt
from attention_predictor.eval.judge import Case, Cell, judge
from attention_predictor.eval.rules import Rule
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.stats import Stats

SMALL = {"policy": "predictor", "sink": 32, "recent": 32, "slab_blocks": 4}


def judged(ids, **settings: object) -> Cell:
    cases = [Case(Excerpt(ids(245, seed=seed)[0].tolist(), ids(20, seed=9 + seed).tolist())) for seed in range(2)]
    return judge(make_tiny_model(), cases, Rule("rule", SMALL | settings), 96)


@pytest.mark.slow
def test_what_captured_steps_fetched_is_counted(emulated, ids) -> None:  # noqa: F811
    by_host, by_device = judged(ids, prefetch="thread"), judged(ids, prefetch="graph")
    assert by_device.fetched_bytes_per_token == pytest.approx(by_host.fetched_bytes_per_token, rel=0.15)
    assert by_device.fetched_bytes_per_token > 0
    assert by_device.hit_rate == pytest.approx(by_host.hit_rate, abs=0.1)


def test_figures_are_asked_for_anew_at_every_document(ids, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine gives them whose device counts: what was counted since is in what is asked for next, not before."""
    kept = Stats()

    def counted(self: Engine) -> Stats:
        kept.steps += 10
        kept.wanted_blocks += 4
        kept.hit_blocks += 3
        kept.late_bytes += 640
        kept.recovery_count += 1
        kept.recovery_sum += 0.5
        kept.relative_recovery_sum += 0.75
        return Stats(**{name: getattr(kept, name) for name in vars(kept)})

    monkeypatch.setattr(Engine, "stats", property(counted))
    cell = judged(ids)
    assert (cell.hit_rate, cell.recovery, cell.fetched_bytes_per_token) == (0.75, 0.5, 64)
    assert cell.relative_by_document == [0.75, 0.75]
