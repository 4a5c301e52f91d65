"""Blocks of another size than the shipped predictor's: said in one line, and recorded and trained for."""

from __future__ import annotations

import json

import pytest
from conftest import POCKET

from attention_predictor import AttentionPredictor, CheckpointError, OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.train.dataset import HistoryDataset


def test_the_default_predictor_says_what_it_is_for(tiny_model):
    with pytest.raises(CheckpointError) as caught:
        attach(tiny_model(), OffloadConfig(block_size=32))
    said = str(caught.value)
    assert "block_size is 16, expected 32" in said
    assert "trained on blocks of 16 tokens, block_size=32 needs one trained on blocks of 32" in said
    assert "attnpred record --block-size 32" in said
    assert "attnpred train" in said
    assert "\n" not in said


@pytest.mark.parametrize("size", [8, 32, 64])
def test_any_size_is_named(size, capsys):
    command = ["generate", "--prompt", "x", "--block-size", str(size), "--max-new-tokens", "2"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"block_size={size} needs one trained on blocks of {size}" in line
    assert main([*command, "--predictor", "ema", "--json"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_recorded_trained_and_used(tmp_path, capsys):
    words = (POCKET.parents[1] / "scripts" / "demo_text.txt").read_text(encoding="utf-8")
    texts, histories, mine = tmp_path / "texts", tmp_path / "histories", tmp_path / "mine"
    texts.mkdir()
    for number in range(2):
        (texts / f"{number}.txt").write_text(words[number * 5000 : (number + 1) * 5000], encoding="utf-8")
    record = ["record", "--data", texts, "--out", histories, "--max-tokens", 512, "--steps", 72, "--per-file", 1]
    assert main([str(one) for one in [*record, "--block-size", 32, "--budgets", 256]]) == 0
    assert HistoryDataset(histories, block_size=32).meta["block_size"] == 32
    train = ["train", "--data", histories, "--out", mine, "--steps", 2, "--batch", 4, "--device", "cpu"]
    assert main([str(one) for one in train]) == 0
    assert AttentionPredictor.from_pretrained(mine, block_size=32).block_size == 32
    capsys.readouterr()
    given = ["generate", "--prompt", "x", "--block-size", 32, "--predictor", mine, "--max-new-tokens", 2, "--json"]
    assert main([str(one) for one in given]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 2


def test_sink_and_recent_must_be_whole_blocks(capsys, tmp_path):
    record = ["record", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--block-size", "128"]
    assert main(record) == 2
    assert "--sink 64: expected a multiple of block_size=128" in capsys.readouterr().err
