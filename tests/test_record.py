"""Recording: rows as sparse decoding leaves them, beside the truth, against rows of full attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import POCKET

from attention_predictor import OffloadConfig
from attention_predictor.cli import main
from attention_predictor.documents import Excerpt
from attention_predictor.errors import DataError
from attention_predictor.loading import load_tokenizer
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.train import recorder
from attention_predictor.train.dataset import HistoryDataset
from attention_predictor.train.estimate import check_space, in_words, largest_size, seconds_a_document
from attention_predictor.train.recorder import FullRecorder, SparseRecorder, record
from attention_predictor.writing import locked

TAIL = 20
STEPS = PROMPT_ROWS + TAIL


def recorded(model, tokens, policy, *others, **settings):
    """Records of the tokens, the last 20 being the tail; of other tails of that length behind them as well."""
    config = OffloadConfig(policy=policy.name, predictor="ema", prefetch="none", **settings)
    return list(record(model, Excerpt(tokens[:-TAIL], [tokens[-TAIL:], *others]), config))


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "gemma2"])
def test_sparse_rows_of_a_budget_that_covers_all_are_full_rows(tiny_model, ids, family):
    model, tokens = tiny_model(family), ids(300)[0].tolist()
    full = recorded(model, tokens, FullRecorder, history=STEPS)
    sparse = recorded(model, tokens, SparseRecorder, late_fetch=0.0)
    assert len(full) == len(sparse) > 0
    for one, other in zip(full, sparse, strict=True):
        assert (one.layer, one.head, one.first_tokens) == (other.layer, other.head, other.first_tokens)
        assert one.scores_QN.shape == other.scores_QN.shape == (STEPS, -(-300 // 16))
        assert (one.scores_QN - other.scores_QN).abs().max() < 1e-4
        assert (one.mass_QN - other.mass_QN).abs().max() < 1e-4


def test_sparse_rows_are_what_the_history_was_told(tiny_model, ids):
    model, tokens = tiny_model("llama"), ids(400)[0].tolist()
    settings = {"budget": 64, "sink": 16, "recent": 16, "late_fetch": 0.0}
    full = recorded(model, tokens, FullRecorder, history=STEPS)
    sparse = recorded(model, tokens, SparseRecorder, **settings)
    blind = recorded(model, tokens, SparseRecorder, calibration="none", **settings)
    for one, other, third in zip(full, sparse, blind, strict=True):
        # The prompt is attended in full; after it blocks outside the budget are estimated, or unknown.
        assert (one.scores_QN - other.scores_QN)[:PROMPT_ROWS].abs().max() < 1e-5
        assert not torch.equal(one.scores_QN, other.scores_QN)
        assert (other.scores_QN[PROMPT_ROWS:, :-1] > 0).all()
        assert (third.scores_QN[PROMPT_ROWS:] > 0).sum(-1).max() <= 64 // 16
        # The mass is the truth for the queries that sparse decoding really had, over all keys.
        assert other.mass_QN.sum(-1).allclose(torch.ones(STEPS), atol=1e-4)


@pytest.mark.parametrize("at_once", [2, 16])
@pytest.mark.parametrize("policy", [FullRecorder, SparseRecorder])
def test_tails_of_one_prompt_are_recorded_as_each_by_itself(tiny_model, ids, policy, at_once, monkeypatch):
    monkeypatch.setattr(recorder, "SEQUENCES", at_once)
    model, tokens = tiny_model("llama"), ids(400)[0].tolist()
    tails = [ids(TAIL, seed=seed)[0].tolist() for seed in (1, 2)]
    settings = {"budget": 64, "sink": 16, "recent": 16, "late_fetch": 0.0}
    together = recorded(model, tokens, policy, *tails, **settings)
    alone = [recorded(model, tokens[:-TAIL] + tail, policy, **settings) for tail in (tokens[-TAIL:], *tails)]
    for one in together:
        other = next(each for each in alone[one.sequence] if (each.layer, each.head) == (one.layer, one.head))
        assert (one.scores_QN - other.scores_QN).abs().max() < 1e-5
        assert (one.mass_QN - other.mass_QN).abs().max() < 1e-5
    assert len({(one.sequence, one.layer, one.head) for one in together}) == len(together) == 3 * len(alone[0])


def test_an_estimate_of_time(tiny_model):
    config = OffloadConfig(policy=SparseRecorder.name, predictor="ema", prefetch="none", late_fetch=0.0)
    like = [Excerpt([0] * 2000, [[0] * 5] * 2), Excerpt([0] * 1000, [[0] * 9])]
    assert 0 < seconds_a_document(tiny_model("llama"), like, config) < 60
    assert (in_words(20), in_words(3600), in_words(9000)) == ("about 1 min", "about 60 min", "about 2.5 h")


def test_a_recording_that_does_not_fit_the_disk_is_refused(tiny_model, tmp_path):
    # 2 layers of 2 KV heads, 100 steps over 1,000 tokens: scores and mass of 63 blocks, 2 bytes each.
    needed = largest_size(tiny_model("llama"), sequences=10, max_tokens=1000, steps=100, block_size=16)
    assert needed == 10 * 2 * 2 * 100 * 63 * 4
    assert "at most 984.38 KiB in" in check_space(tmp_path / "not" / "there yet", needed)
    with pytest.raises(DataError, match=r"may need 1024.00 TiB, .* are free"):
        check_space(tmp_path, 2**50)


@pytest.fixture
def saved(tiny_model, tmp_path):
    """`saved(family)`: the directory of a tiny model with the pocket model's tokenizer."""

    def save(family: str = "llama") -> Path:
        directory = tmp_path / family
        tokenizer = load_tokenizer(str(POCKET))
        tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save


def command(model: Path, data: Path, out: Path, *options: object) -> list[str]:
    """`attnpred record` of the last 70 of 400 tokens."""
    fixed = ("record", "--model", model, "--data", data, "--out", out, "--max-tokens", 400, "--steps", 70)
    return [str(one) for one in (*fixed, "--device", "cpu", *options)]


def write_rows(path: Path, count: int) -> None:
    """Rows of about 700 tokens."""
    text = (POCKET.parents[1] / "scripts" / "demo_text.txt").read_text(encoding="utf-8")
    rows = (json.dumps({"text": text[1000 * i : 1000 * i + 3000]}) + "\n" for i in range(count))
    path.write_text("".join(rows), encoding="utf-8")


def test_a_model_without_full_attention_is_refused_before_anything_is_written(saved, tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", 1)
    assert main(command(saved("mistral-sliding"), tmp_path / "a.jsonl", tmp_path / "out")) == 2
    assert "MistralForCausalLM has no full-attention layer to record" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_recording_goes_on_and_ends_as_one_that_was_not(saved, tmp_path):
    model, data = saved(), tmp_path / "a.jsonl"
    write_rows(data, 8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(model, data, whole)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "attention_predictor.cli", *command(model, data, parts)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in this process: sums in the same order
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(parts.glob("shards/[!.]*")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert len(list(parts.glob("shards/[!.]*"))) < 8
    assert main(command(model, data, parts)) == 0
    one, other = HistoryDataset(parts), HistoryDataset(whole)
    assert one.documents == other.documents
    assert sorted(path.name for path in (parts / "shards").iterdir()) == sorted(
        path.name for path in (whole / "shards").iterdir()
    )
    for document in one.documents:
        mine, its = one.load(document), other.load(document)
        assert torch.equal(mine.scores_XQN, its.scores_XQN)
        assert torch.equal(mine.mass_XQN, its.mass_XQN)


def test_repeats_are_left_out_and_groups_noted(saved, tmp_path, capsys):
    model, data, out = saved(), tmp_path / "texts", tmp_path / "out"
    data.mkdir()
    text = (POCKET.parents[1] / "scripts" / "demo_text.txt").read_text(encoding="utf-8")
    (data / "a.txt").write_text(text[:1200], encoding="utf-8")  # fewer than 400 tokens: the same ones at any place
    (data / "b.txt").write_text(text[:6000], encoding="utf-8")
    (data / "c.txt").write_text("too short", encoding="utf-8")
    for _ in range(2):  # again: repeats stay out
        assert main(command(model, data, out, "--per-file", 2)) == 0
        assert "1 of 6 documents repeat another one of their file" in capsys.readouterr().out
    dataset = HistoryDataset(out)
    assert {document: dataset.group(document) for document in dataset.documents} == {
        "a.txt#0": "a.txt",
        "b.txt#0": "b.txt",
        "b.txt#1": "b.txt",
    }


def test_only_what_is_still_to_record_needs_room(saved, tmp_path, capsys, monkeypatch):
    model, data, out = saved(), tmp_path / "a.jsonl", tmp_path / "out"
    write_rows(data, 2)
    assert main(command(model, data, out)) == 0
    write_rows(data, 3)
    asked = []
    monkeypatch.setattr("attention_predictor.train.record.check_space", lambda _, needed: asked.append(needed) or "")
    assert main(command(model, data, out)) == 0
    assert "recording 1 documents" in capsys.readouterr().out
    assert asked == [2 * 2 * 2 * 2 * 70 * (400 // 16)]
    assert main(command(model, data, out)) == 0
    assert capsys.readouterr().out == f"all 3 documents are in {out}\n"
    for option, value in (("--per-file", 3), ("--validation", 0.9)):
        assert main(command(model, data, out, option, value)) == 2
        assert f"holds a recording with {option[2:].replace('-', '_')}=" in capsys.readouterr().err
    with locked(out):
        assert main(command(model, data, out)) == 2
    assert f"--out {out}: another run is writing to it" in capsys.readouterr().err


def test_settings_of_a_recording_are_kept(saved, tmp_path, capsys):
    model, data, out = saved(), tmp_path / "a.jsonl", tmp_path / "out"
    write_rows(data, 1)
    assert main(command(model, data, out)) == 0
    assert main(command(model, data, out, "--budgets", 512)) == 2
    assert "holds a recording with budgets='256,512', can't add one with '512'" in capsys.readouterr().err


def test_a_process_with_short_documents_only_lets_the_others_go_on(saved, tmp_path, capsys, monkeypatch):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "short"}\n')
    arguments = command(saved(), data, tmp_path / "out")
    assert main(arguments) == 2
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == 0
    assert "1 of 1 documents have no more than" in capsys.readouterr().out
    data.write_text("\n")
    assert main(arguments) == 2
    assert "holds no document" in capsys.readouterr().err
