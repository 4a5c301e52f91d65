"""What predictors are judged by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recordings import META, make_recording

from attention_predictor.predictor.model import architecture
from attention_predictor.train.dataset import HistoryDataset
from attention_predictor.train.validate import candidates, spread, validate


def test_candidates_are_neither_sink_nor_recent() -> None:
    assert candidates(1600, META) == (4, 96)
    assert candidates(1601, META) == (4, 96)
    assert candidates(1616, META) == (4, 97)
    assert candidates(100, META) == (4, 2)


def test_recovery_of_perfect_foresight_is_one(tmp_path: Path) -> None:
    class Predictability(type(architecture("last")())):  # type: ignore[misc]
        def unroll(self, rows_BGRN: torch.Tensor, steps_S: torch.Tensor) -> torch.Tensor:
            return rows_BGRN[:, :, steps_S + 1, :, None]

    make_recording(tmp_path, 1)
    recordings = [HistoryDataset(tmp_path).load("books/0: a title?")]
    by_rule = {
        name: validate(predictor, recordings, META, torch.device("cpu"))
        for name, predictor in (("foresight", Predictability()), ("mean", architecture("mean")()))
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
