"""What predictors and rules are judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recordings import META, make_recording

from attention_predictor.cli import main
from attention_predictor.eval.benchmarks.recovery import command as recovery
from attention_predictor.eval.benchmarks.recovery.judge import Cell, Rule
from attention_predictor.predictor.checkpoint import CONFIG_FILE
from attention_predictor.predictor.model import architecture
from attention_predictor.train.dataset import HistoryDataset
from attention_predictor.train.validate import candidates, spread, validate


def test_candidates_are_neither_sink_nor_recent() -> None:
    assert candidates(1600, META) == (4, 96)
    assert candidates(1601, META) == (4, 96)
    assert candidates(1616, META) == (4, 97)
    assert candidates(100, META) == (4, 2)


def test_recovery_of_perfect_foresight_is_one(tmp_path: Path) -> None:
    class Foresight(type(architecture("last")())):  # type: ignore[misc]
        def unroll(self, rows_BGRN: torch.Tensor, steps_S: torch.Tensor) -> torch.Tensor:
            return rows_BGRN[:, :, steps_S + 1, :, None]

    make_recording(tmp_path, 1)
    recordings = [HistoryDataset(tmp_path).load("books/0: a title?")]
    by_rule = {
        name: validate(predictor, recordings, META, torch.device("cpu"))
        for name, predictor in (("foresight", Foresight()), ("mean", architecture("mean")()))
    }
    for metric in ("relative_recovery", "relative_recovery_ahead", "overlap"):
        assert by_rule["foresight"][metric] == {budget: pytest.approx(1.0) for budget in ("256", "512", "1024")}
        assert by_rule["mean"][metric]["256"] < 0.99
    assert by_rule["foresight"]["mse"]["share"] < 1e-9 < by_rule["mean"]["mse"]["share"]
    assert by_rule["foresight"]["recovery"]["256"] <= by_rule["foresight"]["recovery"]["1024"] <= 1.001


def test_spread() -> None:
    assert spread(0, 3, 10) == [0, 1, 2]
    assert spread(5, 101, 3) == [5, 52, 100]
    assert spread(-1, 1, 3) == [0]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], int]]:
    """What `attnpred eval recovery` judges, with nothing behind it."""
    asked: list[tuple[dict[str, Any], int]] = []

    def judge(model: object, cases: object, rule: Rule, budget: int, **_: object) -> Cell:
        asked.append((rule.settings, budget))
        return Cell(rule.name, budget, rule.settings, recovery=0.5, relative_recovery=0.5)

    for name, stand_in in (("judge", judge), ("load_model", lambda *_: None), ("_tails", lambda _: [])):
        monkeypatch.setattr(recovery, name, stand_in)
    return asked


def evaluate(out: Path, *rules: str, budgets: str = "256") -> int:
    named = [part for rule in rules for part in ("--rule", rule)]
    fixed = ["eval", "recovery", "--data", "x", "--tail", "8", "--out", str(out), "--budgets", budgets]
    return main([*fixed, *named])


def test_a_done_cell_is_kept_unless_its_rule_has_changed(judged: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert evaluate(out, "a: quest", "b: streaming") == 0
    assert evaluate(out, "a: quest", "b: streaming", budgets="256,512") == 0
    quest, streaming = {"policy": "quest"}, {"policy": "streaming"}
    assert judged == [(quest, 256), (streaming, 256), (quest, 512), (streaming, 512)]
    assert evaluate(out, "a: quest,sink=16", "b: streaming") == 0
    assert judged[4:] == [({"policy": "quest", "sink": 16}, 256)]
    found = [(cell["rule"], cell["budget"], cell["settings"]) for cell in json.loads(out.read_text())["cells"]]
    assert len(found) == 4
    assert ("a", 256, {"policy": "quest", "sink": 16}) in found
    table = json.loads(out.read_text())
    for cell in table["cells"]:
        del cell["settings"]  # as earlier releases wrote it
    out.write_text(json.dumps(table))
    assert evaluate(out, "b: streaming") == 0
    assert judged[5:] == [(streaming, 256)]


def test_rules_are_refused_before_anything_runs(
    judged: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = tmp_path / "newer"
    architecture("time-filters")().save(newer)
    config = json.loads((newer / CONFIG_FILE).read_text())
    (newer / CONFIG_FILE).write_text(json.dumps(config | {"format_version": 99}))
    (tmp_path / "list.json").write_text('{"cells": [], "settings": 3}')
    for rules, message in (
        (("predictor", "b: predictor,predictor=nowhere"), "nowhere: no such checkpoint"),
        (("quest", f"b: predictor,predictor={newer}"), "format_version is 99, this release reads 1"),
        (("quest,host_memory=lots",), "host_memory='lots' is not allowed: expected a positive number of bytes"),
        (("a: quest", "a: streaming"), "--rule: names must differ, got a, a"),
    ):
        assert evaluate(tmp_path / "table.json", *rules) == 2
        assert message in capsys.readouterr().err
    assert evaluate(tmp_path / "list.json", "quest") == 2
    assert "list.json is not a table of this command" in capsys.readouterr().err
    assert not judged
