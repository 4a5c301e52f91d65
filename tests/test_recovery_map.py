"""Recovery by layer and head: its mean is what the engine's own figures say, and the oracle recovers the most."""

from __future__ import annotations

import math

import pytest
import torch
from benchmark_runs import evaluate, refused, results, write_texts
from tiny_models import make_tiny_model
from tiny_text_model import save_tiny_text_model, write_jsonl

from attention_predictor.eval.benchmarks.recovery.head_recovery import measure_heads
from attention_predictor.eval.benchmarks.recovery.recovery_map import mean_map, sample_scores
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.teacher_forcing import decode_tails, prefill
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.attach import attach


@pytest.mark.parametrize("policy", ["predictor", "quest", "streaming", "oracle", "pyramidkv"])
@pytest.mark.parametrize("interval", [1, 3])
@torch.no_grad()
def test_means_are_the_engines(policy, interval, ids):
    model = make_tiny_model()
    # A larger reserve lets the predictor find the best blocks of some row of this small model.
    config = OffloadConfig(policy=policy, budget=208, reserve=0.5, measure_recovery=interval)
    with attach(model, config) as engine:
        cache = engine.new_cache()
        prefill(model, cache, ids(500)[0].tolist(), 3)
        found = measure_heads(cache, interval)
        decode_tails(model, cache, ids(12, batch=3, seed=1).tolist())
    assert sorted(found) == [0, 1]
    assert all(layer.measured == 12 // interval for layer in found.values())
    share, relative = (torch.stack(of_layers) for of_layers in zip(*(one.means for one in found.values()), strict=True))
    assert share.shape == relative.shape == (2, 3, 2)  # layers, sequences, KV heads
    assert share.mean().item() == pytest.approx(engine.stats.recovery, abs=1e-5)
    assert relative.mean().item() == pytest.approx(engine.stats.relative_recovery, abs=1e-5)
    assert share.std() > 0
    if policy == "oracle":
        assert torch.allclose(relative, torch.ones(2, 3, 2))
    else:
        assert relative.max() < 1


@torch.no_grad()
def test_watching_changes_no_token(ids):
    model, tails = make_tiny_model(), ids(12, batch=2, seed=1).tolist()
    best = []
    for watching in (False, True):
        with attach(model, OffloadConfig(budget=144)) as engine:
            cache = engine.new_cache()
            prefill(model, cache, ids(400)[0].tolist(), 2)
            if watching:
                measure_heads(cache, 2)
            best.append(decode_tails(model, cache, tails))
    assert torch.equal(*best)


def test_a_failed_document_has_no_figure():
    scores = sample_scores("text", [{"relative_map": [[0.5, 0.7], [0.9, 0.9]]}, {"error": "MemoryError: none"}])
    assert scores[0] == pytest.approx(0.75)
    assert math.isnan(scores[1])


class TestCommand:
    @pytest.fixture
    def given(self, tmp_path):
        model = save_tiny_text_model(tmp_path / "model")
        sizes = ("--context", 400, "--tail", 12, "--interval", 4, "--budgets", 208, "--out", tmp_path / "out")
        texts = write_texts(tmp_path / "texts", sentences=40)
        return ("recovery-map", "--model", model, "--data", f"text={texts}", *sizes)

    def test_maps_table_and_picture(self, given, tmp_path, capsys):
        evaluate(*given, "--policies", "oracle,streaming")
        folder = RunFolder(tmp_path / "out")
        assert folder.variants == ("oracle-208", "streaming-208")
        for record in folder.records("streaming-208", "text"):
            assert record["layers"] == [0, 1]
            for name in ("recovery_map", "relative_map"):
                assert [len(heads) for heads in record[name]] == [2, 2]
                assert all(0 < value < 1 for heads in record[name] for value in heads)
            assert record["prompt_tokens"] == 388
        maps = [record.get("map") for record in folder.records("streaming-208", "text")]
        assert maps[0]["steps"] == [4, 8, 12]
        assert maps[1:] == [None]  # of the first document alone
        assert mean_map(folder, "oracle-208")[1] == [[1.0, 1.0], [1.0, 1.0]]
        lines = [line.rsplit(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
        assert [line[0] for line in lines[1:]] == ["layer 0", "layer 1", "all layers", "worst head"]
        assert lines[3][2] == "100.00"  # the oracle's relative recovery
        assert float(lines[3][3]) < float(lines[3][1])
        assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")

    def test_the_predictor_unless_told_otherwise(self, given, tmp_path):
        evaluate(*given, "--no-plot", "--limit", 1)
        folder = RunFolder(tmp_path / "out")
        assert folder.variants == ("predictor-208",)
        assert not (tmp_path / "out" / "heatmap.png").exists()
        before = results(folder)
        evaluate(*given, "--no-plot", "--limit", 1)
        assert results(RunFolder(tmp_path / "out")) == before

    @pytest.mark.slow
    def test_continuations(self, given, tmp_path):
        path = tmp_path / "asked.jsonl"
        questions = [f"Question: What is it, number {number}?\nAnswer: it" for number in range(10)]
        write_jsonl(path, [{"text": "Nobody knows what it is. " * 20, "continuations": questions}])
        evaluate(*given, "--data", path, "--tail", 64, "--policies", "streaming")
        (record,) = RunFolder(tmp_path / "out").records("streaming-208", "asked")
        assert record["new_tokens"] == 10 * len(questions[0])
        assert len(record["relative_map"]) == 2

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--policies", "full"), "policy 'full' attends to everything, so it has no recovery to measure"),
            (("--policies", "predictor,full"), "policy 'full' attends to everything"),
            (("--rule", "all: full,prefetch=none"), "policy 'full' attends to everything"),
            (("--rule", "fast: predictor,prefetch=graph"), "fast-208: captured steps can't be measured"),
            (("--interval", "0"), "--interval 0: expected 1 to --tail 12"),
            (("--interval", "13"), "--interval 13: expected 1 to --tail 12"),
            (("--context", "5000"), "--context 5000: the model has positions for 4096 tokens"),
            (("--tail", "400"), "--tail 400: expected 1 to below --context 400"),
        ],
    )
    def test_refuses(self, given, options, said, capsys, monkeypatch):
        assert said in refused(capsys, monkeypatch, *given, *options)
