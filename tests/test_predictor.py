"""Predictors: what they compute, how they are saved, and which checkpoints are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.predictor import scores
from attention_predictor.predictor.model import (
    ARCHITECTURES,
    AttentionPredictor,
    FilterPredictor,
    WindowPredictor,
    architecture,
)

ALL = sorted(ARCHITECTURES)
LEARNED = ["paper", "time-filters"]


def make_rows(rows: int, n_blocks: int = 21, seed: int = 0) -> Tensor:
    """Heavy-tailed scores_BGRN of 2 sequences and 3 KV heads, like real ones mostly close to zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, rows, n_blocks, generator=generator) ** 6


def literal_paper_scores(predictor: WindowPredictor, rows_RN: Tensor) -> Tensor:
    """The published network of one head, written out: sums over taps, nothing from torch.nn.functional."""

    def conv2d(maps_CRN: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        channels, rows, blocks = maps_CRN.shape
        padded = torch.zeros(channels, rows + 2, blocks + 2)
        padded[:, 1:-1, 1:-1] = maps_CRN
        out = bias[:, None, None].expand(-1, rows, blocks).clone()
        for i in range(3):
            for j in range(3):
                window = padded[:, i : i + rows, j : j + blocks]
                out += (weight[:, :, i, j][..., None, None] * window).sum(1)
        return out

    p = dict(predictor.named_parameters())
    hidden = conv2d(rows_RN[None], p["conv1.weight"], p["conv1.bias"]).clamp(min=0)
    hidden = conv2d(hidden, p["conv2.weight"], p["conv2.bias"]).clamp(min=0)
    mean_CN = hidden.sum(1) / rows_RN.shape[0]
    return (p["conv3.weight"][0] * mean_CN).sum(0) + p["conv3.bias"]


# What a row is


def test_recovery_is_a_share_of_the_mass_there_is() -> None:
    mass_XN = torch.tensor([[0.4, 0.1, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    chosen_XN = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    best_XN = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    found = scores.recovery(mass_XN, chosen_XN, best_XN)
    assert found.share.tolist() == pytest.approx([0.5 / 0.8, 0.0, 0.0])  # a sink took the rest of the first
    assert found.relative.tolist() == pytest.approx([0.5 / 0.6, 0.0, 0.0])
    most = scores.recovery(mass_XN, torch.ones_like(best_XN), torch.ones_like(best_XN))
    assert most.share.tolist() == most.relative.tolist() == pytest.approx([1.0, 0.0, 1.0])


def test_scores_and_mass_of_blocks() -> None:
    prob_BHQT = torch.rand(2, 6, 4, 37).softmax(-1)
    scores_BGQN = scores.block_scores(prob_BHQT, kv_heads=3, block_size=16)
    mass_BGQN = scores.block_mass(prob_BHQT, kv_heads=3, block_size=16)
    assert scores_BGQN.shape == mass_BGQN.shape == (2, 3, 4, 3)
    assert torch.equal(scores_BGQN[1, 2, 3, 2], prob_BHQT[1, 4:6, 3, 32:].max())
    assert torch.allclose(mass_BGQN[0, 1, 2, 1], prob_BHQT[0, 2:4, 2, 16:32].sum(-1).mean())
    assert torch.allclose(mass_BGQN.sum(-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("wrong", [{"kv_heads": 4}, {"kv_heads": 0}, {"block_size": 0}])
def test_scores_refuse_wrong_shapes(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scores.block_scores(torch.rand(1, 6, 1, 8), **{"kv_heads": 2, "block_size": 16, **wrong})


# What they compute


@pytest.mark.parametrize("n_blocks", [1, 2, 5, 40])
def test_window_predictor_is_the_published_network(n_blocks: int) -> None:
    torch.manual_seed(1)
    predictor = WindowPredictor()
    assert {name: list(p.shape) for name, p in predictor.state_dict().items()} == {
        "conv1.weight": [16, 1, 3, 3],
        "conv1.bias": [16],
        "conv2.weight": [32, 16, 3, 3],
        "conv2.bias": [32],
        "conv3.weight": [1, 32, 1],
        "conv3.bias": [1],
    }
    assert predictor.describe()["parameters"] == 4833
    rows_BGRN = make_rows(70, n_blocks)
    state_BGNC = predictor.start(rows_BGRN)
    scores_BGN = predictor(state_BGNC)
    window_RN = rows_BGRN[1, 2, -64:].half().float()  # the state is kept in fp16
    torch.testing.assert_close(scores_BGN[1, 2], literal_paper_scores(predictor, window_RN))


def test_window_predictor_is_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = WindowPredictor()
    state_BGNC = predictor.start(make_rows(64, 300))
    whole = predictor(state_BGNC)
    monkeypatch.setattr("attention_predictor.predictor.window.TILE_ELEMENTS", 1)
    torch.testing.assert_close(predictor(state_BGNC), whole)


def test_filters_are_exponential_averages_of_the_logarithm() -> None:
    predictor = FilterPredictor()
    rows_BGRN = make_rows(9)
    state_BGNC = predictor.start(rows_BGRN)
    decay_F = predictor.logit_decay.sigmoid()
    log_BGRN = torch.log1p(rows_BGRN * 1e5) / torch.log1p(torch.tensor(1e5))
    average = log_BGRN[:, :, 0, :, None].expand(-1, -1, -1, 8)
    for step in range(1, 9):
        average = decay_F * average + (1 - decay_F) * log_BGRN[:, :, step, :, None]
    torch.testing.assert_close(state_BGNC[..., :8], average)
    torch.testing.assert_close(state_BGNC[..., 8], log_BGRN[:, :, -1])
    half_lives = 0.5**0.5, 0.5 ** (1 / 64)
    assert decay_F.min() < half_lives[0]
    assert decay_F.max() > half_lives[1]


def test_silence_stays_silent_in_the_filters() -> None:
    predictor = FilterPredictor()
    state_BGNC = predictor.start(torch.zeros(1, 1, 5, 3))
    assert not predictor.observe(state_BGNC, torch.zeros(1, 1, 3)).any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_start_equals_observing_row_by_row(name: str, rows: int) -> None:
    predictor = architecture(name)()
    rows_BGRN = make_rows(rows)
    with torch.no_grad():
        state_BGNC = predictor.start(rows_BGRN[:, :, :1])
        for step in range(1, rows):
            state_BGNC = predictor.observe(state_BGNC, rows_BGRN[:, :, step])
        started_BGNC = predictor.start(rows_BGRN)
    assert started_BGNC.shape == (2, 3, 21, predictor.channels)
    assert started_BGNC.dtype == predictor.state_dtype
    torch.testing.assert_close(started_BGNC, state_BGNC, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("steps", [[0], [79], [0, 3, 63, 64, 79], [40, 41, 77], list(range(80))])
def test_unroll_equals_observing_row_by_row(name: str, steps: list[int]) -> None:
    predictor = architecture(name)()
    rows_BGRN = make_rows(80)
    with torch.no_grad():
        unrolled_BGSNC = predictor.unroll(rows_BGRN, torch.tensor(steps))
        state_BGNC = predictor.start(rows_BGRN[:, :, :1])
        for step in range(80):
            if step:
                state_BGNC = predictor.observe(state_BGNC, rows_BGRN[:, :, step])
            if step in steps:
                found = unrolled_BGSNC[:, :, steps.index(step)]
                torch.testing.assert_close(found, state_BGNC, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_only_the_last_rows_of_a_long_prompt_count(name: str) -> None:
    predictor = architecture(name)()
    rows_BGRN = make_rows(100)
    assert torch.equal(predictor.start(rows_BGRN), predictor.start(rows_BGRN[:, :, -predictor.rows :]))


def test_rules() -> None:
    rows_BGRN = make_rows(64)
    states = {name: architecture(name)().start(rows_BGRN) for name in ("last", "ema", "mean")}
    found = {name: architecture(name)()(state) for name, state in states.items()}
    average_BGN = rows_BGRN[:, :, 0]
    for row_BGN in rows_BGRN.unbind(2)[1:]:
        average_BGN = 0.9 * average_BGN + 0.1 * row_BGN
    torch.testing.assert_close(found["last"], rows_BGRN[:, :, -1])
    torch.testing.assert_close(found["ema"], average_BGN)
    torch.testing.assert_close(found["mean"], rows_BGRN.mean(2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_blocks_farther_away_than_its_reach_do_not_count(name: str) -> None:
    predictor, reach = architecture(name)(), {"time-filters": 4, "paper": 2}.get(name, 0)
    rows_BGRN = make_rows(16)
    other_BGRN = F.pad(rows_BGRN[..., :-3], (0, 3), value=0.5)
    before_BGN, after_BGN = (predictor(predictor.start(rows)) for rows in (rows_BGRN, other_BGRN))
    torch.testing.assert_close(after_BGN[..., : -3 - reach], before_BGN[..., : -3 - reach])
    assert not torch.equal(after_BGN[..., -3 - reach], before_BGN[..., -3 - reach])


# How they are loaded


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    predictor = architecture(name)()
    predictor.training_facts = {"documents": 3, "recovery": {"512": 0.9}}
    predictor.save(tmp_path / "new" / "folder")
    loaded = AttentionPredictor.from_pretrained(tmp_path / "new" / "folder")
    assert type(loaded) is type(predictor)
    assert not loaded.training
    assert loaded.describe() == predictor.describe()
    state_BGNC = predictor.start(make_rows(64))
    assert torch.equal(loaded.start(make_rows(64)), state_BGNC)
    assert torch.equal(loaded(state_BGNC), predictor(state_BGNC))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_rules_load_by_name_and_need_no_files() -> None:
    for name in ("last", "ema", "mean"):
        assert AttentionPredictor.from_pretrained(name).arch == name


def test_unknown_architecture_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'cnn' is not a predictor; choose from ema, last, mean, paper, time-filters"):
        architecture("cnn")


def test_default_is_a_shipped_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_predictor.predictor.base.WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="default: no such checkpoint"):
        AttentionPredictor.from_pretrained("default")
    FilterPredictor().save(tmp_path / "default")
    assert AttentionPredictor.from_pretrained("default").arch == "time-filters"


def test_another_architecture_is_refused_by_a_concrete_class(tmp_path: Path) -> None:
    FilterPredictor().save(tmp_path)
    with pytest.raises(CheckpointError, match="arch is 'time-filters', expected 'paper'"):
        WindowPredictor.from_pretrained(tmp_path)


CONFIG_DAMAGE = {
    "newer": ({"format_version": 2}, "format_version is 2, this release reads 1 to 1; upgrade"),
    "no version": ({"format_version": None}, "format_version is None"),
    "boolean version": ({"format_version": True}, "format_version is True"),
    "unknown arch": (
        {"arch": "resnet"},
        "arch is 'resnet', expected one of ema, last, mean, paper, time-filters",
    ),
    "no arch": ({"arch": None}, "arch is None"),
    "unhashable arch": ({"arch": ["paper"]}, "arch is \\['paper'\\]"),
    "block size": ({"block_size": 32}, "block_size is 32, expected 16"),
    "rows": ({"rows": 128}, "rows is 128, expected 64"),
    "training": ({"training": "long"}, "training is 'long', expected an object"),
    "swapped arch": ({"arch": "paper"}, r"missing tensors \['conv1|missing tensors"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_config_refusals(damage: str, tmp_path: Path) -> None:
    changes, message = CONFIG_DAMAGE[damage]
    FilterPredictor().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    refuse(tmp_path, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\x00", '"paper"'])
def test_foreign_config_files_are_refused(text: str, tmp_path: Path) -> None:
    FilterPredictor().save(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refuse(tmp_path, "config.json: (not readable|found a JSON)")


@pytest.mark.parametrize("name", LEARNED)
def test_weight_refusals(name: str, tmp_path: Path) -> None:
    architecture(name)().save(tmp_path)
    path = tmp_path / "model.safetensors"
    good, whole = load_file(path), path.read_bytes()
    some = "conv2.weight"

    save_file({k: v for k, v in good.items() if k != some}, path)
    refuse(tmp_path, r"missing tensors \['conv2.weight'\], unexpected tensors \[\]")
    save_file(good | {"conv9.weight": torch.zeros(1)}, path)
    refuse(tmp_path, r"missing tensors \[\], unexpected tensors \['conv9.weight'\]")
    save_file(good | {some: torch.zeros(2, 2)}, path)
    refuse(tmp_path, r"conv2.weight has shape \[2, 2\], expected \[")
    save_file(good | {some: good[some].int()}, path)
    refuse(tmp_path, "conv2.weight has dtype torch.int32, expected floating point")
    for bad in (float("nan"), float("inf")):
        save_file(good | {some: torch.full_like(good[some], bad)}, path)
        refuse(tmp_path, "conv2.weight holds NaN or infinity")
    for kept in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refuse(tmp_path, "model.safetensors: truncated or not a safetensors file")
    path.unlink()
    refuse(tmp_path, "model.safetensors: file is missing")


def test_missing_places_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "config.json: file is missing")
    refuse(
        tmp_path / "nowhere",
        "no such checkpoint; allowed: a directory with model.safetensors and config.json",
    )
    (tmp_path / "best_model.pth").write_bytes(b"PK")
    refuse(tmp_path / "best_model.pth", "no such checkpoint")
    with pytest.raises(CheckpointError, match="can't save a predictor here"):
        FilterPredictor().save(tmp_path / "best_model.pth")


def test_the_requested_block_size_must_be_the_trained_one(tmp_path: Path) -> None:
    FilterPredictor(block_size=32).save(tmp_path)
    refuse(tmp_path, "block_size is 32, expected 16")
    assert AttentionPredictor.from_pretrained(tmp_path, block_size=32).block_size == 32


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        AttentionPredictor.from_pretrained(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
