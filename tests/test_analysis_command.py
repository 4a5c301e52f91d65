"""`attnpred analyze`: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmark_runs import write_texts
from tiny_text_model import make_tiny_tokenizer, save_tiny_text_model, write_jsonl
from transformers import DeepseekV3Config

from attention_predictor.cli import main
from attention_predictor.errors import DataError
from attention_predictor.eval.analysis import document
from attention_predictor.eval.analysis.examples import BOTH, MISSED, NEEDLESS, NEITHER, Example, Image, choices
from attention_predictor.eval.analysis.gallery import gallery
from attention_predictor.eval.analysis.patterns import CLASSES
from attention_predictor.eval.analysis.summary import summarise
from attention_predictor.eval.harness import runner
from attention_predictor.eval.harness.run_folder import RunFolder

FEW = ("--context", 400, "--tail", 16, "--window", 8, "--budget", 208)


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    model = save_tiny_text_model(tmp_path / "model")
    texts = write_texts(tmp_path / "texts", count=3, sentences=40)
    return ["--model", model, "--data", f"text={texts}", "--out", tmp_path / "out", *FEW]


def analyse(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Must be refused before the model is loaded; returns the one line that is said."""

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runner, "load_model", load)
    assert analyse(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_it_writes(given, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pytest.importorskip("matplotlib")
    assert analyse(*given, "--parquet", "--plot", tmp_path / "plots" / "heads.png") == 0
    out = tmp_path / "out"
    assert (tmp_path / "plots" / "heads.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert [line.split("  ")[0] for line in said.splitlines()[1:4]] == ["layer 0", "layer 1", "all layers"]
    assert "rank correlation over query heads" in said

    summary = json.loads((out / "heads.json").read_text())
    assert summary["documents"] == {"text": 3}
    assert summary["failures"] == []
    heads = summary["heads"]
    assert [(head["layer"], head["head"], head["kv_head"]) for head in heads] == [
        (layer, head, head // 2) for layer in range(2) for head in range(4)
    ]
    for head in heads:
        assert head["pattern"] in CLASSES
        assert sum(head[f"maps_{name.replace('-', '_')}"] for name in CLASSES) == 3
        assert -1 <= head["qsim_prompt"] <= 1
        assert 0 < head["predictor_relative"] <= 1
        assert len(head["channels"]) == 5  # four pairs, and channels that don't turn
    assert len(summary["wavelengths"]["0"]) == 4
    assert parquet.read_table(out / "heads.parquet").to_pylist() == heads

    pairs = json.loads((out / "correlation.json").read_text())
    assert {one["over"] for one in pairs} == {"head", "kv_head"}
    assert {one["pairs"] for one in pairs if one["over"] == "head"} == {8}


def test_means_are_over_documents(given, tmp_path):
    assert analyse(*given) == 0
    folder = RunFolder.finished(tmp_path / "out")
    records = folder.records("attention", "text")
    assert len(records) == 3
    heads = json.loads((tmp_path / "out" / "heads.json").read_text())["heads"]
    for place, head in enumerate(heads):
        values = [record["rows"][place]["vertical"] for record in records]
        assert head["vertical"] == pytest.approx(sum(values) / 3)


def test_the_page_needs_nothing(given, tmp_path):
    assert analyse(*given) == 0
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.findall(r"(?:href|src)=\"(?!data:image/png)", page)
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    for name in CLASSES:
        assert f"<h3>{name}: " in page
    summary = summarise(RunFolder.finished(tmp_path / "out"))
    drawn = sum(len(examples) for examples in summary.examples.values())
    assert drawn >= 1
    assert page.count("<img ") == 3 * drawn
    missing = [name for name in CLASSES if not summary.examples[name]]
    assert page.count("None of these documents shows it in this model.") == len(missing)
    summary.settings = dict(summary.settings) | {"model": "<b>&"}
    assert "<b>&<" not in gallery(summary)


def test_goes_on_where_it_was_stopped(given, tmp_path, monkeypatch):
    seen = []
    whole = document.analyse

    def until_the_third(engine, excerpt, judgement):
        seen.append(excerpt)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(engine, excerpt, judgement)

    monkeypatch.setattr("attention_predictor.eval.analysis.benchmark.analyse", until_the_third)
    assert analyse(*given) == 130
    assert not (tmp_path / "out" / "gallery.html").exists()
    assert analyse(*given) == 0
    assert len(seen) == 4  # the third once more, none of the first two
    stopped = json.loads((tmp_path / "out" / "heads.json").read_text())
    monkeypatch.undo()
    assert analyse(*given[:4], "--out", tmp_path / "other", *FEW) == 0
    assert json.loads((tmp_path / "other" / "heads.json").read_text()) == stopped


def test_a_failed_document_is_said(given, tmp_path, monkeypatch, capsys):
    whole, calls = document.analyse, []

    def failing(engine, excerpt, judgement):
        calls.append(excerpt)
        if len(calls) == 2:
            raise MemoryError("no room <here>")
        return whole(engine, excerpt, judgement)

    monkeypatch.setattr("attention_predictor.eval.analysis.benchmark.analyse", failing)
    assert analyse(*given) == 0
    assert "failed, left out: text b.txt#0: MemoryError: no room <here>" in capsys.readouterr().out
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert "Failed and left out: 1 documents; text b.txt#0: MemoryError" in page
    assert "no room <here>" not in page
    monkeypatch.setattr("attention_predictor.eval.analysis.benchmark.analyse", whole)
    assert analyse(*given, "--retry-errors") == 0
    assert json.loads((tmp_path / "out" / "heads.json").read_text())["documents"] == {"text": 3}


def test_none_succeeds(given, monkeypatch, capsys):
    def failing(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("attention_predictor.eval.analysis.benchmark.analyse", failing)
    assert analyse(*given) == 1
    assert "no document succeeded: text a.txt#0: MemoryError: no room" in capsys.readouterr().out


def test_continuations_are_tails(given, tmp_path):
    path = tmp_path / "asked.jsonl"
    questions = [f"Question: What is it, number {number}?\nAnswer: it" for number in range(6)]
    write_jsonl(path, [{"text": "Nobody knows what it is. " * 12, "continuations": questions}])
    assert analyse(*given, "--data", f"asked={path}", "--tail", 64, "--tails", 3) == 0
    (record,) = RunFolder.finished(tmp_path / "out").records("attention", "asked")
    assert {row["sequence"] for row in record["rows"]} == {0, 1, 2}
    assert len(record["rows"]) == 3 * 2 * 4
    assert record["new_tokens"] == 3 * len(questions[0])


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--context", 5000), "--context 5000: the model has positions for 4096 tokens"),
            (("--context", 4000), "--data text: no document is long enough: text needs 4000 tokens (--context)"),
            (
                ("--budget", 384),
                "--budget 384: expected less than --context minus --tail",
            ),
            (("--budget", 128), "--budget 128: expected at least sink + recent + one block"),
            (("--window", 1), "--window 1: expected at least 2 queries, to make a pair"),
            (("--tails", 0), "--tails 0: expected at least 1"),
            (("--tail", 1), "--tail 1: expected at least 2 steps, to compare"),
            (("--limit", 0), "--limit 0: expected at least 1"),
            (("--predictor", "nowhere"), "nowhere: no such checkpoint"),
            (("--data", "text=nowhere.txt"), "--data: names must differ"),
            (("--data", "nowhere/*.txt"), "no file matches nowhere/*.txt"),
            (("--model", "nowhere"), "cannot load the configuration of 'nowhere'"),
            (("--dtype", "float8"), "--dtype float8: expected one of auto"),
        ],
    )
    def test_settings(self, given, options, said, capsys, monkeypatch, tmp_path):
        assert said in refused(capsys, monkeypatch, *given, *options)
        assert not (tmp_path / "out").exists()

    def test_rows_that_are_too_short(self, given, tmp_path, capsys, monkeypatch):
        path = tmp_path / "asked.jsonl"
        write_jsonl(path, [{"text": "Short.", "continuations": ["What?", "Where?"]}])
        said = refused(capsys, monkeypatch, *given, "--data", path)
        assert "--data asked: no document is long enough" in said
        assert "rows with continuations 209 of a prompt" in said

    def test_models_whose_attention_cannot_be_seen(self, given, tmp_path, capsys, monkeypatch):
        latent, sliding = tmp_path / "latent", tmp_path / "sliding"
        DeepseekV3Config(num_hidden_layers=1).save_pretrained(latent)
        make_tiny_tokenizer().save_pretrained(latent)
        assert "uses multi-head latent attention" in refused(capsys, monkeypatch, *given, "--model", latent)
        save_tiny_text_model(sliding, family="mistral-sliding")
        capsys.readouterr()  # how far saving has come
        assert "has no full-attention layer" in refused(capsys, monkeypatch, *given, "--model", sliding)

    def test_a_directory_of_another_run(self, given, tmp_path, capsys, monkeypatch):
        assert analyse(*given) == 0
        capsys.readouterr()
        said = refused(capsys, monkeypatch, *given, "--window", 9)
        assert "holds another run: settings.window is 8 there, asked for 9" in said
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "letter.txt").write_text("dear reader")
        said = refused(capsys, monkeypatch, *given, "--out", tmp_path / "full")
        assert "is not empty and not the directory of a run" in said

    def test_results_of_something_else(self, given, tmp_path, capsys):
        assert analyse(*given) == 0
        path = tmp_path / "out" / "attention" / "text.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        del records[0]["rows"][0]["pattern"]
        write_jsonl(path, records)
        with pytest.raises(DataError, match="not results of an analysis: KeyError"):
            summarise(RunFolder.finished(tmp_path / "out"))


def test_images_come_back():
    import torch

    pixels_QC = torch.randint(0, 256, (7, 31), generator=torch.Generator().manual_seed(0))
    image = Image.of(pixels_QC)
    assert image.pixels().tolist() == pixels_QC.tolist()
    with pytest.raises(DataError, match="an image of 8 × 31 has 217 pixels"):
        Image(8, 31, image.data).pixels()
    example = Example({"pattern": "retrieval"}, image, image, image, 64, 1, 400)
    assert Example.from_dict(json.loads(json.dumps(example.to_dict()))) == example
    chosen, best = torch.tensor([[0, 1, 0, 1]]).bool(), torch.tensor([[0, 1, 1, 0]]).bool()
    assert choices(chosen, best).tolist() == [[NEITHER, BOTH, MISSED, NEEDLESS]]
