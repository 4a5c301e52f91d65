"""The pocket model's tasks under the runner: the same answers are found as by judging them directly."""

from __future__ import annotations

import pytest
from benchmark_runs import evaluate, refused, results, write_texts
from conftest import POCKET
from tiny_text_model import make_tiny_tokenizer, save_tiny_text_model

from attention_predictor.documents import opening
from attention_predictor.eval.benchmarks.synthetic.benchmark import SyntheticBenchmark, find_answers, sample_scores
from attention_predictor.eval.benchmarks.synthetic.documents import plant, read_texts
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.variants import Variant


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_finds_what_judging_finds(tmp_path, pocket, capsys):
    model, tokenizer = pocket
    texts = write_texts(tmp_path / "texts")
    evaluate(
        *("synthetic", "--model", POCKET, "--data", texts, "--tasks", "facts,kv", "--context", 600),
        *("--questions", 4, "--per-document", 4, "--policies", "full,streaming", "--budgets", 208),
        *("--out", tmp_path / "out"),
    )
    folder = RunFolder(tmp_path / "out")
    assert folder.tasks == ("facts", "kv")
    for task in folder.tasks:
        samples = plant(
            tokenizer,
            read_texts(texts),
            tasks=[task],
            documents=1,
            questions=4,
            context=600 - len(opening(tokenizer)),
            seed=0,
        )
        for variant, policy in (("full", "full"), ("streaming-208", "streaming")):
            with Variant.of(Rule(policy, {"policy": policy}), 208).attached(model) as engine:
                direct = [find_answers(EvaluatedModel(model, engine), tokenizer, one)["found"] for one in samples]
            records = folder.records(variant, task)
            assert [one["found"] for one in records] == direct
            assert [len(one["answers"]) for one in records] == [len(one.questions) for one in samples]
        assert sum(map(sum, (one["found"] for one in folder.records("full", task)))) >= 3
    assert capsys.readouterr().out.split()[:5] == ["right,", "%", "facts", "kv", "mean"]


def test_scores():
    records = [
        {"found": [True, False, True, True], "answers": ["a", "b", "c", "d"]},
        {"found": [], "answers": ["a", "b"], "error": "MemoryError: none"},
    ]
    assert sample_scores("kv", records) == [0.75, 0.0]


def test_samples_come_from_the_seed(tmp_path):
    texts = read_texts(write_texts(tmp_path, sentences=200))

    def prompts(seed: int) -> list[str]:
        benchmark = SyntheticBenchmark(
            make_tiny_tokenizer(), texts, ["kv"], questions=4, per_document=2, context=2000, seed=seed
        )
        return [one.prompt for one in benchmark.samples("kv")]

    assert prompts(1) == prompts(1) != prompts(2)
    assert len(prompts(1)) == 2


class TestCommand:
    @pytest.fixture
    def given(self, tmp_path):
        model = save_tiny_text_model(tmp_path / "model")
        sizes = ("--context", 1500, "--questions", 4, "--per-document", 2, "--budgets", 144, "--out", tmp_path / "out")
        return ("synthetic", "--model", model, "--data", write_texts(tmp_path / "texts", sentences=200), *sizes)

    def test_goes_on_and_takes_more_tasks(self, given, tmp_path):
        evaluate(*given, "--tasks", "kv", "--policies", "full")
        before = results(RunFolder(tmp_path / "out"))
        evaluate(*given, "--tasks", "chain", "--policies", "full")
        after = results(RunFolder(tmp_path / "out"))
        assert after["full", "kv"] == before["full", "kv"]
        assert len(after["full", "chain"]) == 2

    def test_takes_more_questions(self, given, tmp_path):
        evaluate(*given, "--tasks", "kv", "--policies", "full")
        evaluate(*given, "--tasks", "kv", "--policies", "full", "--questions", 6)
        more = results(RunFolder(tmp_path / "out"))
        assert len(more["full", "kv"]) == 3
        evaluate(*given, "--tasks", "kv", "--policies", "full", "--questions", 6, "--out", tmp_path / "alone")
        assert results(RunFolder(tmp_path / "alone")) == more

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--tasks", "riddles"), "no synthetic task 'riddles': expected some of kv, facts, chain"),
            (("--tasks", "kv,kv"), "--tasks kv,kv: a value is given twice"),
            (("--questions", "0"), "--questions 0: expected at least 1"),
            (("--per-document", "-1"), "--per-document -1: expected at least 1"),
            (("--context", "5000"), "--context 5000: the model has positions for 4096 tokens"),
            (
                ("--questions", 90, "--per-document", 90),
                "a context of 1499 tokens is too short for task kv: length: expected at least",
            ),
            (("--data", "nowhere"), "cannot read text from nowhere"),
        ],
    )
    def test_refuses(self, given, options, said, capsys, monkeypatch):
        assert said in refused(capsys, monkeypatch, *given, *options)

    @pytest.mark.slow
    def test_long_paragraphs_alone_are_refused(self, given, tmp_path, capsys, monkeypatch):
        (tmp_path / "one.txt").write_text("A sentence of a paragraph that never ends. " * 100)
        line = refused(capsys, monkeypatch, *given, "--data", tmp_path / "one.txt")
        assert "a context of 1499 tokens is too short for task kv: paragraphs: expected some of at most" in line
