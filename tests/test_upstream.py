"""Weights as the method's authors publish them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.errors import CheckpointError
from attention_predictor.predictor.model import AttentionPredictor, FilterPredictor

SHAPES = {
    "conv1.weight": (16, 1, 3, 3),
    "conv1.bias": (16,),
    "conv2.weight": (32, 16, 3, 3),
    "conv2.bias": (32,),
    "conv3.weight": (1, 32, 1),
    "conv3.bias": (1,),
}


def made_up() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def published(weights: dict[str, Tensor], window_XRN: Tensor) -> Tensor:
    """Conv2d → ReLU → Conv2d → ReLU → mean over the rows → Conv1d."""
    maps = F.conv2d(window_XRN[:, None], weights["conv1.weight"], weights["conv1.bias"], padding=1).relu()
    maps = F.conv2d(maps, weights["conv2.weight"], weights["conv2.bias"], padding=1).relu()
    return F.conv1d(maps.mean(2), weights["conv3.weight"], weights["conv3.bias"])[:, 0]


def test_it_computes_the_published_function(tmp_path: Path) -> None:
    weights = made_up()
    torch.save(weights, tmp_path / "best_model.pth")
    predictor = AttentionPredictor.from_upstream(tmp_path / "best_model.pth")
    assert sum(p.numel() for p in predictor.parameters()) == 4833
    window_BGNR = torch.rand(1, 3, 200, 64).half()
    expected = published(weights, window_BGNR[0].float().transpose(1, 2))
    with torch.no_grad():
        assert (predictor(window_BGNR)[0] - expected).abs().max() < 1e-6
    predictor.save(tmp_path / "saved")  # from then on a checkpoint like any other
    assert AttentionPredictor.from_pretrained(tmp_path / "saved").training_facts == {"upstream": "best_model.pth"}


def test_a_wrapped_state_dict_is_refused_by_the_names_it_has(tmp_path: Path) -> None:
    torch.save({"state_dict": made_up(), "epoch": 3}, tmp_path / "checkpoint.pth")
    message = r"missing tensors \['conv1.bias', .*\], unexpected tensors \['epoch', 'state_dict'\]"
    with pytest.raises(CheckpointError, match=message):
        AttentionPredictor.from_upstream(tmp_path / "checkpoint.pth")
    torch.save([1, 2], tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="found list, expected tensors by name"):
        AttentionPredictor.from_upstream(tmp_path / "checkpoint.pth")


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("attacked",)


DAMAGE = {
    "missing": ({"conv3.bias": None}, r"missing tensors \['conv3.bias'\], unexpected tensors \[\]"),
    "unexpected": ({"conv4.bias": torch.ones(1)}, r"missing tensors \[\], unexpected tensors \['conv4.bias'\]"),
    "shape": ({"conv1.bias": torch.ones(8)}, r"conv1.bias has shape \[8\], expected \[16\]"),
    "nan": ({"conv1.bias": torch.full((16,), torch.nan)}, "conv1.bias holds NaN"),
    "no tensor": ({"conv1.bias": 3}, "conv1.bias is of type int, expected a tensor"),
    "numbered": ({7: torch.ones(1)}, r"unexpected tensors \['7'\]"),
    "code": ({"conv1.bias": Attack()}, "not a file of weights only"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_anything_else_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes, message = DAMAGE[damage]
    weights = {name: value for name, value in (made_up() | changes).items() if value is not None}
    torch.save(weights, "best_model.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        AttentionPredictor.from_upstream("best_model.pth")
    assert "\n" not in str(caught.value)
    assert not Path("attacked").exists()


def test_files_that_are_no_pickles(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="file is missing"):
        AttentionPredictor.from_upstream(tmp_path / "nothing.pth")
    whole = tmp_path / "whole.pth"
    torch.save(made_up(), whole)
    for content in (b"", b"text", whole.read_bytes()[:500]):
        (tmp_path / "damaged.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file of weights only"):
            AttentionPredictor.from_upstream(tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="expected 'time-filters'"):
        FilterPredictor.from_upstream(whole)
