"""Perplexity under a budget: the stock model's is that of one forward pass, and a whole budget changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from benchmark_runs import evaluate, refused, results, write_texts
from tiny_text_model import save_tiny_text_model

from attention_predictor.eval.benchmarks.perplexity import bits_per_token, sample_scores
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.windows import Windows, parse_sources
from attention_predictor.loading import load_model, load_tokenizer


@pytest.fixture
def texts(tmp_path):
    (write_texts(tmp_path / "texts", sentences=40) / "short.txt").write_text("Too short.")
    return tmp_path / "texts"


@pytest.fixture
def given(tmp_path, texts):
    model = save_tiny_text_model(tmp_path / "model")
    sizes = ("--context", 400, "--tail", 24, "--out", tmp_path / "out")
    return ("perplexity", "--model", model, "--data", f"text={texts}", *sizes)


@pytest.mark.slow
def test_what_a_single_forward_pass_says(given, tmp_path, texts, capsys):
    evaluate(*given, "--policies", "full,predictor,streaming", "--budgets", "144,512")
    printed = capsys.readouterr().out
    assert printed.startswith("text: 1 documents have fewer than 400 tokens and are skipped\n")
    folder = RunFolder(tmp_path / "out")
    assert folder.variants == ("full", "predictor-144", "predictor-512", "streaming-144", "streaming-512")
    model, tokenizer = load_model(str(tmp_path / "model")), load_tokenizer(str(tmp_path / "model"))
    total = 0.0
    for record, (name, part) in zip(
        folder.records("full", "text"),
        Windows(parse_sources([f"text={texts}"]), tokenizer, 400, 24).of("text"),
        strict=True,
    ):
        ids = torch.tensor([part.prompt + part.tails[0]])
        with torch.no_grad():
            log_LV = model(ids).logits[0].log_softmax(-1)
        expected = log_LV[range(375, 399), ids[0, 376:]].sum().item()
        assert (record["id"], record["tokens"], record["prompt_tokens"]) == (name, 24, 376)
        assert record["bytes"] == len(tokenizer.decode(part.tails[0]).encode())
        assert record["log_likelihood"] == pytest.approx(expected, abs=1e-3)
        assert sample_scores("text", [record]) == [pytest.approx(-expected / 24 / math.log(2), abs=1e-4)]
        total += expected
    bits = {variant: bits_per_token(folder, variant, "text") for variant in folder.variants}
    assert bits["full"] == pytest.approx(-total / 48 / math.log(2), abs=1e-4)
    assert bits["predictor-512"] == pytest.approx(bits["full"], abs=1e-4) == bits["streaming-512"]
    assert abs(bits["streaming-144"] - bits["full"]) > 1e-3
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert lines["text: all"][-5] == f"{bits['full']:.2f}"
    assert lines["text: perplexity"][-5] == f"{2 ** bits['full']:.2f}"
    assert set(lines) >= {"a.txt#0", "b.txt#0"}


def test_goes_on_where_it_stopped(given, tmp_path):
    evaluate(*given, "--policies", "full")
    path = tmp_path / "out" / "full" / "text.jsonl"
    before = results(RunFolder(tmp_path / "out"))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    evaluate(*given, "--policies", "full")
    assert results(RunFolder(tmp_path / "out")) == before


def test_a_failed_document_has_no_figure():
    good = {"id": "a", "log_likelihood": -24 * math.log(2), "tokens": 24}
    scores = sample_scores("text", [good, {"id": "b", "error": "MemoryError: none"}])
    assert scores[0] == pytest.approx(1.0)
    assert math.isnan(scores[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--context", "5000"), "--context 5000: the model has positions for 4096 tokens"),
        (("--tail", "400"), "--tail 400: expected 1 to below --context 400"),
        (("--per-file", "0"), "--per-file 0: expected at least 1"),
        (("--data", "text=other.txt"), "--data: names must differ, got text, text"),
        (("--data", "nowhere.txt"), "nowhere.txt: neither a file"),
        (("--context", "4000"), "--data text: no document has 4000 tokens"),
        (("--budgets", "100"), "budget=100 is not allowed"),
    ],
)
def test_refuses(given, options, said, capsys, monkeypatch):
    assert said in refused(capsys, monkeypatch, *given, *options)
