"""Needle in a haystack: what counts as found, the grid, and the command."""

from __future__ import annotations

import json
import random

import pytest
from benchmark_runs import evaluate, make_text, refused, results, write_texts
from conftest import POCKET
from tiny_text_model import make_tiny_tokenizer, save_tiny_text_model, write_jsonl

from attention_predictor.eval.benchmarks.fixed_length import Haystack
from attention_predictor.eval.benchmarks.needle import (
    KINDS,
    Needle,
    NeedleTest,
    contains,
    grid,
    read_needles,
    sample_scores,
)
from attention_predictor.eval.harness.run_folder import RunFolder


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        (" 1234\n\n", "1234", True),
        ("It is 1234.", "1234", True),
        ("It is 51234.", "1234", False),
        ("It is 12345.", "1234", False),
        ("He lives in PORTO, I think", "Porto", True),
        ("the porter", "Porto", False),
        ("a watchmaker's", "watchmaker", True),
        ("答案是北京。", "北京", True),
        ("Dolores Park (on a sunny day)", "dolores park", True),
        ("a+b", "a+b", True),
        ("", "1234", False),
    ],
)
def test_contains(text, answer, found):
    assert contains(text, answer) is found


def test_scores_count_any_answer_and_failed_ones():
    records = [
        {"pred": "in Rome", "answers": ["Paris", "Rome"]},
        {"pred": "in Oslo", "answers": ["Paris", "Rome"]},
        {"pred": "", "answers": ["Rome"], "error": "RuntimeError: Rome"},
    ]
    assert sample_scores("512", records) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_answers_its_question(kind):
    for seed in range(20):
        needle = Needle.make(kind, random.Random(seed))
        assert needle.answers[0] in needle.statement
        assert needle.statement.endswith(".")
        assert "\n" not in needle.statement
        assert needle.question.endswith("?")


def make_test(**changes) -> NeedleTest:
    arguments = {"lengths": [600, 900], "depths": [0, 50, 100], "samples": 2, "chat": False, "context": 4096}
    arguments |= changes
    lengths, depths = arguments.pop("lengths"), arguments.pop("depths")
    return NeedleTest(make_tiny_tokenizer(), Haystack({"one": make_text()}), lengths, depths, **arguments)


def test_needles_stand_at_their_depth_in_prompts_of_the_length():
    benchmark = make_test(lengths=[1500])
    for sample in benchmark.samples("1500"):
        prompt = benchmark.prompt("1500", sample.hidden["number"])
        assert 1500 - 9 < len(prompt) + 32 <= 1500  # no word is longer
        text = benchmark.tokenizer.decode(prompt, skip_special_tokens=True)
        haystack, question = text.split("\n\nQuestion: ")
        assert question.endswith("?\nAnswer:")
        place = haystack.index(sample.record["answers"][0]) / len(haystack)
        assert place == pytest.approx(sample.record["depth"] / 100, abs=0.12)
    assert [one.record["depth"] for one in benchmark.samples("1500")] == [0, 50, 100, 0, 50, 100]
    assert {one.record["kind"] for one in benchmark.samples("1500") if one.record["depth"] == 50} == set(KINDS)


class TestCommand:
    @pytest.fixture
    def model(self, tmp_path):
        return save_tiny_text_model(tmp_path / "model")

    @pytest.fixture
    def given(self, tmp_path, model):
        return (
            *("needle", "--model", model, "--data", write_texts(tmp_path / "texts"), "--no-chat"),
            *("--lengths", "400,600", "--depths", "0,100", "--samples", 1, "--budgets", 144, "--out", tmp_path / "out"),
        )

    def test_grid_table_and_picture(self, given, tmp_path, capsys):
        evaluate(*given, "--policies", "full,streaming")
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split() == ["found,", "%", "400", "600", "mean"]
        assert [line.split()[0] for line in printed[1:3]] == ["full", "streaming-144"]
        folder = RunFolder(tmp_path / "out")
        (record, other) = folder.records("full", "600")
        assert (record["length"], record["depth"], other["depth"]) == (600, 0, 100)
        assert record["prompt_tokens"] + 32 <= 600
        assert grid(folder, "full") == [[0.0, 0.0], [0.0, 0.0]]  # of a random model
        assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")

    def test_goes_on_and_takes_more_lengths(self, given, tmp_path, capsys):
        evaluate(*given, "--policies", "full", "--no-plot")
        before = results(RunFolder(tmp_path / "out"))
        assert not (tmp_path / "out" / "heatmap.png").exists()
        evaluate(*given, "--policies", "full", "--lengths", "300")
        folder = RunFolder(tmp_path / "out")
        assert {key: value for key, value in results(folder).items() if key in before} == before
        assert len(grid(folder, "full")[0]) == 3
        assert folder.tasks == ("400", "600", "300")

    def test_given_needles(self, given, tmp_path):
        path = tmp_path / "needles.jsonl"
        write_jsonl(path, [{"needle": "The cat is blue.", "question": "Which colour has the cat?", "answer": "blue"}])
        evaluate(*given, "--policies", "full", "--needles", path)
        for one in RunFolder(tmp_path / "out").records("full", "400"):
            assert (one["answers"], one["kind"]) == (["blue"], "given")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--lengths", "5000"), "length 5000: the model has positions for 4096 tokens"),
            (("--lengths", "60"), "task 60: length 60 is too short; a sample without filler has "),
            (("--lengths", "x"), "--lengths x: expected numbers from 1 on, separated by commas"),
            (("--lengths", "400,400"), "--lengths 400,400: a value is given twice"),
            (("--depths", "0,101"), "--depths 101: expected percentages, from 0 to 100"),
            (("--samples", "0"), "--samples 0: expected at least 1"),
            (("--data", "nowhere"), "cannot read text from nowhere"),
            (("--policies", "sorcery"), "policy='sorcery' is not allowed: expected one of full"),
            (("--needles", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
            (("--model", "nowhere"), "nowhere"),
        ],
    )
    def test_refuses(self, given, options, said, capsys, monkeypatch):
        assert said in refused(capsys, monkeypatch, *given, *options)

    def test_needs_a_chat_template_unless_told_otherwise(self, given, capsys, monkeypatch):
        without = [one for one in given if one != "--no-chat"]
        assert "no chat template: --no-chat gives prompts as they are" in refused(capsys, monkeypatch, *without)

    def test_another_runs_directory(self, given, capsys, monkeypatch):
        evaluate(*given, "--policies", "full")
        capsys.readouterr()
        line = refused(capsys, monkeypatch, *given, "--depths", "0,50")
        assert "holds another run: settings.depths is [0, 100] there, asked for [0, 50]" in line

    def test_in_a_chat(self, given, tmp_path):
        model = save_tiny_text_model(tmp_path / "chat", chat=True)
        evaluate(*[one for one in given if one != "--no-chat"], "--model", model, "--policies", "full")
        assert RunFolder(tmp_path / "out").records("full", "400")[0]["prompt_tokens"] + 32 <= 400


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": "a"}, "line 1: expected a text in 'needle'; found fields question, answer"),
        ({"needle": "n", "question": 3, "answer": "a"}, "line 1: expected a text in 'question'"),
        ({"needle": "n", "question": "q", "answer": []}, "line 1: expected a text, or a list of them, in 'answer'"),
        ({"needle": "n", "question": "q"}, "line 1: expected a text, or a list of them, in 'answer'; found None"),
        ({"needle": "n", "question": "q", "answer": " "}, "line 1: 'answer' is empty"),
    ],
)
def test_bad_needles(row, said, tmp_path):
    path = tmp_path / "needles.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="needles.jsonl, " + said.replace("(", r"\(")):
        read_needles(path)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_the_pocket_model_finds_needles(tmp_path):
    evaluate(
        *("needle", "--model", POCKET, "--data", write_texts(tmp_path / "texts"), "--no-chat", "--lengths", 512),
        *("--depths", "10,50", "--samples", 2, "--policies", "full,predictor", "--budgets", 208),
        *("--out", tmp_path / "out"),
    )
    folder = RunFolder(tmp_path / "out")
    assert grid(folder, "full") == [[1.0], [1.0]]
    assert sum(map(sum, grid(folder, "predictor-208"))) >= 1.5
