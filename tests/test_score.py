"""``attnpred score``: predictions in the official form, and runs."""

from __future__ import annotations

import json

import pytest
from tiny_text_model import write_jsonl

from attention_predictor.cli import main
from attention_predictor.eval.benchmarks.longbench.tasks import TASKS
from attention_predictor.eval.harness.run_folder import RunFolder


def prediction(pred: str = "the sky", **changes: object) -> dict:
    """A line as LongBench's own script writes it."""
    return {"pred": pred, "answers": ["sky", "sea"], "all_classes": None, "length": 5000} | changes


def scored(capsys, *arguments: object) -> dict:
    assert main(["score", "longbench", "--json", *[str(one) for one in arguments]]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments: object) -> str:
    try:
        code = main(["score", *[str(one) for one in arguments]])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


class TestIndices:
    @pytest.mark.parametrize("index", [None, "0", 1.0, True, [0], {"a": 0}])
    def test_what_is_no_integer_is_refused(self, index, capsys, tmp_path):
        write_jsonl(tmp_path / "qasper.jsonl", [prediction(index=0), *[prediction(index=index)] * 3])
        said = fails(capsys, "longbench", tmp_path)
        assert f"{tmp_path / 'qasper.jsonl'}, line 2: expected an integer in 'index', found {index!r}" in said

    @pytest.mark.parametrize("first", [{"index": 2}, {}])
    def test_all_lines_have_one_or_none(self, first, capsys, tmp_path):
        other = {} if first else {"index": 1}
        write_jsonl(tmp_path / "qasper.jsonl", [prediction(**first), prediction(**other)])
        said = fails(capsys, "longbench", tmp_path)
        assert "qasper.jsonl, line 2: expected 'index' in all lines or in none" in said

    def test_lines_without_are_samples_each(self, capsys, tmp_path):
        write_jsonl(tmp_path / "qasper.jsonl", [prediction()] * 3)
        assert scored(capsys, tmp_path)["samples"] == {"qasper": 3}

    @pytest.mark.parametrize("levels", [101, 900, 100_000])
    def test_deep_json(self, levels, capsys, tmp_path):
        line = json.dumps(prediction())
        (tmp_path / "qasper.jsonl").write_text(f'{line}\n{line[:-1]}, "more": {nested(levels)}}}\n')
        said = fails(capsys, "longbench", tmp_path)
        assert f"{tmp_path / 'qasper.jsonl'}, line 2: not readable as JSON: nested more than 100 levels" in said


class TestPredictions:
    def test_json(self, capsys, tmp_path):
        write_jsonl(tmp_path / "qasper.jsonl", [prediction(), prediction("blue sea"), prediction("")])
        write_jsonl(tmp_path / "passage_count.jsonl", [prediction("12, no 3", answers=["3"])])
        (tmp_path / "result.json").write_text("{}")  # which the official scorer leaves there
        assert scored(capsys, tmp_path) == {
            "tasks": {"qasper": 55.56, "passage_count": 50.0},
            "categories": {
                "single-document QA": 55.56,
                "multi-document QA": None,
                "summarisation": None,
                "few-shot learning": None,
                "synthetic tasks": 50.0,
                "code completion": None,
            },
            "english_average": None,
            "samples": {"qasper": 3, "passage_count": 1},
            "errors": {"qasper": 0, "passage_count": 0},
        }

    def test_table(self, capsys, tmp_path):
        folder = tmp_path / "mine"
        folder.mkdir()
        write_jsonl(folder / "qasper.jsonl", [prediction(), prediction("", error="RuntimeError: no")])
        assert main(["score", "longbench", str(folder)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "score  qasper  single-document QA  16 English tasks",
            "mine    50.00               50.00                 –",
            "failed, counted as 0 (each line's 'error' says why): mine qasper 1 of 2",
        ]

    def test_by_length(self, capsys, tmp_path):
        write_jsonl(tmp_path / "qasper.jsonl", [prediction(length=10), prediction("", length=10), prediction()])
        assert scored(capsys, tmp_path, "-e") == {
            "tasks": {"qasper": {"0-4k": 50.0, "4-8k": 100.0, "8k+": None}},
            "averages": {"0-4k": 50.0, "4-8k": 100.0, "8k+": None},
            "samples": {"qasper": 3},
            "errors": {"qasper": 0},
        }

    def test_length_is_needed_only_there(self, capsys, tmp_path):
        lines = [{key: value for key, value in prediction().items() if key not in ("length", "all_classes")}]
        write_jsonl(tmp_path / "qasper.jsonl", lines)
        assert scored(capsys, tmp_path)["tasks"] == {"qasper": 100.0}
        assert "line 1: expected a number in 'length', found fields pred, answers" in fails(
            capsys, "longbench", tmp_path, "-e"
        )

    def test_every_task_has_a_score(self, capsys, tmp_path):
        for name in TASKS:
            answer = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3"}.get(name, "3")
            write_jsonl(tmp_path / f"{name}.jsonl", [prediction("3", answers=[answer], all_classes=["3"])])
        found = scored(capsys, tmp_path)
        assert found["tasks"] == dict.fromkeys(TASKS, 100.0)
        assert found["english_average"] == 100.0

    def test_a_sample_tried_again_counts_once(self, capsys, tmp_path):
        lines = [prediction("", index=0, error="E: x"), prediction("", index=1), prediction(index=0)]
        write_jsonl(tmp_path / "qasper.jsonl", lines)
        found = scored(capsys, tmp_path)
        assert (found["tasks"], found["samples"], found["errors"]) == ({"qasper": 50.0}, {"qasper": 2}, {"qasper": 0})

    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"pred": None}, "qasper.jsonl, line 2: expected a text in 'pred', found None"),
            ({"answers": "sky"}, "qasper.jsonl, line 2: expected a list of texts in 'answers', found 'sky'"),
        ],
    )
    def test_a_bad_line(self, capsys, tmp_path, changes, line):
        write_jsonl(tmp_path / "qasper.jsonl", [prediction(), prediction(**changes)])
        assert line in fails(capsys, "longbench", tmp_path)

    def test_missing_fields(self, capsys, tmp_path):
        write_jsonl(tmp_path / "trec.jsonl", [{"pred": "x", "answers": ["x"]}])
        assert "trec.jsonl, line 1: expected a list of texts in 'all_classes', found fields pred, answers" in fails(
            capsys, "longbench", tmp_path
        )
        (tmp_path / "trec.jsonl").write_text('{"pred": "x", "answ')
        assert "trec.jsonl, line 1: not readable as JSON" in fails(capsys, "longbench", tmp_path)
        (tmp_path / "trec.jsonl").write_text("\n")
        assert "trec.jsonl: no predictions in it" in fails(capsys, "longbench", tmp_path)

    def test_what_is_no_directory_of_predictions(self, capsys, tmp_path):
        assert "no <task>.jsonl in it" in fails(capsys, "longbench", tmp_path)
        assert "no such directory" in fails(capsys, "longbench", tmp_path / "none")
        write_jsonl(tmp_path / "trek.jsonl", [prediction()])
        assert "no LongBench task 'trek': expected some of narrativeqa" in fails(capsys, "longbench", tmp_path)
        assert "invalid choice: 'shortbench'" in fails(capsys, "shortbench", tmp_path)


class TestRuns:
    @pytest.fixture
    def folder(self, tmp_path):
        description = {
            "benchmark": "longbench",
            "settings": {"extended": False},
            "tasks": {"qasper": {"samples": 2}, "trec": {"samples": 1}},
            "variants": {"full": {}, "quest-256": {}},
        }
        folder = RunFolder(tmp_path)
        with folder.opened(description, {}):
            for variant in folder.variants:
                folder.results(variant, "qasper").parent.mkdir()
        write_jsonl(folder.results("full", "qasper"), [prediction(index=0), prediction("", index=1)])
        write_jsonl(folder.results("full", "trec"), [prediction("sky", all_classes=["sky"], index=0)])
        write_jsonl(folder.results("quest-256", "qasper"), [prediction(index=0)])
        return folder

    def test_table_of_an_unfinished_run(self, capsys, folder):
        assert main(["score", "longbench", str(folder.path)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "score      qasper    trec  single-document QA  few-shot learning  16 English tasks",
            "full        50.00  100.00               50.00             100.00                 –",
            "quest-256  100.00       –              100.00                  –                 –",
            "not finished: quest-256 qasper 1 of 2, quest-256 trec 0 of 1",
        ]

    def test_json(self, capsys, folder):
        found = scored(capsys, folder.path)
        assert {name: one["tasks"] for name, one in found["variants"].items()} == {
            "full": {"qasper": 50.0, "trec": 100.0},
            "quest-256": {"qasper": 100.0},
        }

    def test_a_run_of_another_benchmark(self, capsys, folder):
        text = folder.file.read_text()
        folder.file.write_text(text.replace('"longbench"', '"needle"'))
        assert "is a run of needle, not of longbench" in fails(capsys, "longbench", folder.path)
        folder.file.write_text("{}")
        assert "run.json is not the description of a run" in fails(capsys, "longbench", folder.path)
