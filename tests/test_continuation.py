"""Long generation compared with the whole cache's: references, divergences, resuming, failures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from benchmark_runs import evaluate, refused, write_texts
from tiny_text_model import save_tiny_text_model

from attention_predictor.errors import DataError
from attention_predictor.eval.benchmarks import continuation
from attention_predictor.eval.benchmarks.continuation import PARTS, Reference, compare, write_reference
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.loading import load_model

PROMPT = [5, 9, 7, 31, 12, 8] * 20


@pytest.fixture
def model(tmp_path):
    return load_model(str(save_tiny_text_model(tmp_path / "model")))


@pytest.fixture
def given(tmp_path):
    model, texts = save_tiny_text_model(tmp_path / "model"), write_texts(tmp_path / "texts", sentences=40)
    sizes = ("--context", 300, "--new-tokens", 40, "--out", tmp_path / "out")
    return ("continuation", "--model", model, "--data", f"text={texts}", *sizes)


def test_a_reference_is_what_the_model_writes(model):
    reference = write_reference(EvaluatedModel(model, None), PROMPT, 30)
    options = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0}
    wanted = model.generate(torch.tensor([PROMPT]), **options)
    assert reference.token_L.tolist() == wanted[0, len(PROMPT) :].tolist()
    with torch.no_grad():
        log_LV = model(wanted[:, :-1]).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
    assert torch.equal(reference.best_L, log_LV.argmax(-1))
    torch.testing.assert_close(reference.log_LK, log_LV.gather(1, reference.top_LK), atol=1e-4, rtol=1e-4)
    assert (reference.log_LK.diff(dim=1) <= 0).all()


def test_it_goes_on_where_the_model_would_end(model):
    subject = EvaluatedModel(model, None)
    first = write_reference(subject, PROMPT, 10)
    model.generation_config.eos_token_id = [int(first.token_L[4])]
    other = write_reference(subject, PROMPT, 10)
    assert torch.equal(other.token_L[:4], first.token_L[:4])
    assert len(other.token_L) == 10
    assert first.token_L[4] not in other.token_L
    assert other.best_L[4] == first.best_L[4] != other.token_L[4]


def test_a_model_does_not_differ_from_itself(model):
    subject = EvaluatedModel(model, None)
    found = compare(subject, PROMPT, write_reference(subject, PROMPT, 33))
    assert (found["tokens"], found["agreement"], found["first_difference"]) == (33, 1.0, 33)
    assert abs(found["kl"]) < 1e-6
    assert len(found["kl_by_part"]) == len(found["agreement_by_part"]) == PARTS


@pytest.mark.parametrize("kept", [5, 10_000])
def test_divergence_is_that_of_the_distributions(model, monkeypatch, kept):
    """Of all tokens where all are kept; where few are, of these and the others as one: never more."""
    monkeypatch.setattr(continuation, "KEPT", kept)
    reference = write_reference(EvaluatedModel(model, None), PROMPT, 12)
    path = torch.tensor([PROMPT + reference.token_L.tolist()[:-1]])
    with torch.no_grad():
        p_LV = model(path).logits[0, len(PROMPT) - 1 :].double().log_softmax(-1)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        q_LV = model(path).logits[0, len(PROMPT) - 1 :].double().log_softmax(-1)
    found = compare(EvaluatedModel(model, None), PROMPT, reference)
    whole = float((p_LV.exp() * (p_LV - q_LV)).sum(-1).mean())
    same = p_LV.argmax(-1) == q_LV.argmax(-1)
    assert whole > 0.01
    assert found["kl"] == pytest.approx(whole, rel=1e-3) if kept > 5 else 0 < found["kl"] < whole
    assert found["agreement"] == pytest.approx(float(same.double().mean()))
    assert not same.all()
    assert found["first_difference"] == same.tolist().index(False)


@pytest.mark.slow
def test_a_run(given, tmp_path, capsys):
    evaluate(*given, "--policies", "full,streaming,predictor", "--budgets", "144,512")
    printed = capsys.readouterr().out
    folder = RunFolder(tmp_path / "out")
    assert folder.variants == ("full", "streaming-144", "streaming-512", "predictor-144", "predictor-512")
    for variant in ("full", "streaming-512", "predictor-512"):  # budgets that hold everything
        for record in folder.records(variant, "text"):
            assert (record["tokens"], record["prompt_tokens"], record["first_difference"]) == (40, 300, 40)
            assert record["kl"] == pytest.approx(0, abs=1e-5)
    (kl,) = {record["kl"] for record in folder.records("streaming-144", "text")[:1]}
    assert kl > 1e-5
    lines = [line.split() for line in printed.splitlines() if line.startswith("text: ")]
    assert [line[1] for line in lines] == list(folder.variants)
    assert lines[0][2:] == ["0.0000"] * 5 + ["100.00", "40.00"]
    references = sorted((tmp_path / "out" / "references" / "text").iterdir())
    assert len(references) == len(folder.records("full", "text")) == 2
    # What is there stays; more policies follow the same path.
    times = [path.stat().st_mtime_ns for path in references]
    evaluate(*given, "--policies", "quest", "--budgets", "144")
    assert [path.stat().st_mtime_ns for path in references] == times
    assert "quest-144" in RunFolder(tmp_path / "out").variants


def test_a_reference_that_is_lost_or_broken(given, tmp_path, capsys):
    evaluate(*given, "--policies", "full")
    first, second = sorted((tmp_path / "out" / "references" / "text").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    evaluate(*given, "--policies", "streaming", "--budgets", "144")
    records = RunFolder(tmp_path / "out").records("streaming-144", "text")
    assert sorted("error" in record for record in records) == [False, True]  # the lost one was written again
    (error,) = (record["error"] for record in records if "error" in record)
    assert "no continuation by the stock model" in error
    assert math.isnan(continuation.sample_scores("text", [{"error": error}])[0])
    assert "left out of the figures" in capsys.readouterr().out
    with pytest.raises(DataError, match="no continuation by the stock model"):
        Reference.read(tmp_path / "nowhere.pt")


def test_what_is_refused(given, capsys, monkeypatch):
    def line(option: str, value: int) -> str:
        at = given.index(option)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            return refused(capsys, patch, *given[: at + 1], value, *given[at + 2 :])

    assert "--new-tokens 0: expected at least 1" in line("--new-tokens", 0)
    assert "positions" in line("--new-tokens", 10**6)
    assert "no document has 3001 tokens" in line("--context", 3000)
    evaluate(*given, "--policies", "full")
    assert "new_tokens" in line("--new-tokens", 41)


def test_what_is_written_holds_plain_values(given, tmp_path):
    evaluate(*given, "--policies", "full")
    described = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (described["context"], described["new_tokens"]) == (300, 40)
