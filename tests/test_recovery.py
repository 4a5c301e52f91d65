"""``attnpred eval recovery``: captured steps count too, figures are of one document, tables, resume and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_runs import evaluate, write_texts
from test_graph import emulated  # noqa: F401
from tiny_models import make_tiny_model
from tiny_text_model import save_tiny_text_model

from attention_predictor.cli import main
from attention_predictor.eval.benchmarks.recovery.command import TailRecovery
from attention_predictor.eval.harness import runner
from attention_predictor.eval.harness.attached_model import AttachedModel
from attention_predictor.eval.harness.bootstrap import wilson_interval
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.variants import Variant
from attention_predictor.eval.report.results_table import make_tables
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.stats import Stats
from attention_predictor.predictor.checkpoint import CONFIG_FILE
from attention_predictor.predictor.model import architecture

SMALL = {"policy": "predictor", "sink": 32, "recent": 32, "slab_blocks": 4}


def measured(ids, **settings: object) -> list[Record]:
    """Records of two documents."""
    benchmark: Any = TailRecovery(SimpleNamespace(names=("text",)))  # type: ignore[arg-type]
    variant = Variant.of(Rule("rule", SMALL | settings), 96)
    records = []
    with AttachedModel(make_tiny_model(), variant) as attached:
        for seed in range(2):
            hidden = {"prompt": ids(245, seed=seed)[0].tolist(), "tails": ids(20, seed=9 + seed).tolist()}
            sample = runner.Sample(str(seed), "", {}, hidden)
            records.append(runner._attempt(benchmark, 0, attached, "text", sample))
    assert not any("error" in one for one in records), records
    return records


def fetched_per_token(records: list[Record]) -> float:
    return sum(one["fetched_bytes"] for one in records) / sum(one["steps"] * one["sequences"] for one in records)


@pytest.mark.slow
def test_what_captured_steps_fetched_is_counted(emulated, ids) -> None:  # noqa: F811
    by_host, by_device = measured(ids, prefetch="thread"), measured(ids, prefetch="graph")
    assert fetched_per_token(by_device) == pytest.approx(fetched_per_token(by_host), rel=0.15)
    assert fetched_per_token(by_device) > 0
    for one, other in zip(by_device, by_host, strict=True):
        assert one["hit_rate"] == pytest.approx(other["hit_rate"], abs=0.1)


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
    records = measured(ids)
    assert [(one["hit_rate"], one["recovery"]) for one in records] == [(0.75, 0.5), (0.75, 0.5)]
    assert fetched_per_token(records) == 64
    assert [one["relative_recovery"] for one in records] == [0.75, 0.75]


def test_wilson_interval() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(199, 200) == pytest.approx((0.9722, 0.9991), abs=1e-4)


@pytest.fixture
def given(tmp_path: Path) -> tuple[object, ...]:
    model = save_tiny_text_model(tmp_path / "model")
    texts = write_texts(tmp_path / "texts", count=1, sentences=40)
    return ("recovery", "--model", model, "--data", texts, "--tail", 8, "--context", 400)


def test_a_done_variant_is_kept_and_a_changed_rule_refused(given, tmp_path: Path, capsys, monkeypatch) -> None:
    out = ("--out", tmp_path / "run")
    evaluate(*given, *out, "--rule", "a: quest", "--rule", "b: streaming", "--budgets", 208)
    folder = RunFolder(tmp_path / "run")
    assert folder.variants == ("a-208", "b-208")
    times = [folder.results(one, "texts").stat().st_mtime_ns for one in folder.variants]
    evaluate(*given, *out, "--rule", "a: quest", "--rule", "b: streaming", "--budgets", "208,240")
    folder = RunFolder(tmp_path / "run")
    assert [folder.results(one, "texts").stat().st_mtime_ns for one in ("a-208", "b-208")] == times
    assert set(folder.variants) == {"a-208", "b-208", "a-240", "b-240"}
    capsys.readouterr()
    assert main(["eval", *map(str, (*given, *out)), "--rule", "a: quest,sink=16", "--budgets", "208"]) == 2
    assert "variants.a-208.sink is 64 there, asked for 16" in capsys.readouterr().err


@pytest.mark.slow
def test_mixed_questions_and_their_report(tmp_path: Path, capsys) -> None:
    model, texts = save_tiny_text_model(tmp_path / "model"), write_texts(tmp_path / "texts", sentences=200)
    sizes = ("--context", 1500, "--questions", 4, "--per-document", 2, "--budgets", 144, "--recovery", 2)
    evaluate("recovery", "--model", model, "--data", texts, *sizes, "--out", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert (folder.tasks, folder.variants) == (("kv+facts",), ("full", "predictor-144"))
    assert [one["task"] for one in folder.records("full", "kv+facts")] == ["kv", "facts"]
    head, full, predictor = capsys.readouterr().out.splitlines()
    assert "found [95% interval]" in head
    assert full.endswith("–")
    assert "±" in predictor
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    questions, recovery = make_tables([tmp_path / "run"])
    assert questions.title.startswith("Planted questions")
    assert recovery.title.startswith("Recovery")
    assert 50 < recovery.figures["predictor-144", "kv+facts"].value <= 100
    assert ("full", "kv+facts") not in recovery.figures  # the stock model has no recovery


def test_without_a_directory_only_the_table_is_left(given, tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.iterdir())
    evaluate(*given, "--rule", "b: streaming", "--budgets", 208)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split("  ") == ["variant", "recovery", "relative ± half its 95% interval"]
    assert row.startswith("b-208")
    assert sorted(tmp_path.iterdir()) == before


def test_rules_are_refused_before_anything_runs(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(runner, "load_model", lambda *_: pytest.fail("the model was loaded"))
    newer = tmp_path / "newer"
    architecture("time-filters")().save(newer)
    config = json.loads((newer / CONFIG_FILE).read_text())
    (newer / CONFIG_FILE).write_text(json.dumps(config | {"format_version": 99}))
    (tmp_path / "list.json").write_text('{"cells": [], "settings": 3}')

    def refused(out: Path, *rules: str) -> str:
        named = [part for rule in rules for part in ("--rule", rule)]
        fixed = ["eval", "recovery", "--data", "x", "--tail", "8", "--out", str(out), "--budgets", "256"]
        assert main([*fixed, *named]) == 2
        return capsys.readouterr().err

    for rules, message in (
        (("predictor", "b: predictor,predictor=nowhere"), "nowhere: no such checkpoint"),
        (("quest", f"b: predictor,predictor={newer}"), "format_version is 99, this release reads 1"),
        (("quest,host_memory=lots",), "host_memory='lots' is not allowed: expected a positive number of bytes"),
        (("a: quest", "a: streaming"), "--rule: names must differ, got a, a"),
    ):
        assert message in refused(tmp_path / "run", *rules)
    texts = write_texts(tmp_path / "texts", count=1, sentences=400)
    model = save_tiny_text_model(tmp_path / "model")
    given = ["eval", "recovery", "--model", model, "--data", texts, "--tail", 8, "--context", 400, "--rule", "quest"]
    assert main([*map(str, given), "--out", str(tmp_path / "list.json")]) == 2
    assert "list.json is not a directory" in capsys.readouterr().err
