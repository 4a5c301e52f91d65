"""Disks that are full, readers that go away, input that is no text: one line, and what was done stays."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_runs import results, write_texts
from recordings import make_recording
from tiny_text_model import longbench_row, save_tiny_text_model, write_jsonl, write_longbench

from attention_predictor.cli import main
from attention_predictor.eval.harness import predictions
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train import dataset as dataset_module
from attention_predictor.train.dataset import HistoryDataset
from attention_predictor.train.state import STATE_FILE
from attention_predictor.writing import LOCK

NO_ROOM = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_text_model(tmp_path_factory.mktemp("model"))


def run(*arguments: object) -> int:
    try:
        return main([str(one) for one in arguments])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def full_after(monkeypatch: pytest.MonkeyPatch, module: object, number: int, code: int) -> None:
    """The disk is full from the so-manieth flush to it on."""
    fsync, calls = os.fsync, iter(range(1000))

    def failing(file: int) -> None:
        if next(calls) >= number:
            raise OSError(code, os.strerror(code))
        fsync(file)

    monkeypatch.setattr(module.os, "fsync", failing)


class TestFullDisks:
    @pytest.mark.parametrize("code", NO_ROOM, ids=errno.errorcode.get)
    def test_an_evaluation_keeps_its_samples_and_goes_on(self, model, tmp_path, monkeypatch, capsys, code):
        data, out = write_longbench(tmp_path / "data", ["trec"], samples=4), tmp_path / "out"
        given = ["eval", "longbench", "--model", model, "--data", data, "--no-chat", "--tasks", "trec"]
        given += ["--policies", "full", "--device", "cpu", "--out"]
        with monkeypatch.context() as patch:
            full_after(patch, predictions, 3, code)  # run.json, two samples
            line = refused(capsys, *given, out)
        path = out / "full" / "trec.jsonl"
        assert line == f"attnpred eval: {path}: can't be written: {os.strerror(code)}"
        assert [one["index"] for one in RunFolder(out).records("full", "trec")][:2] == [0, 1]
        assert run(*given, out) == 0
        assert run(*given, tmp_path / "whole") == 0
        assert results(RunFolder(out)) == results(RunFolder(tmp_path / "whole"))

    def test_half_a_line_is_no_sample(self, tmp_path):
        path = tmp_path / "a.jsonl"
        with predictions.Appender(path) as file:
            file.append({"index": 0})
        path.write_bytes(path.read_bytes() + b'{"index": 1, "pre')
        with predictions.Appender(path) as file:
            file.append({"index": 1})
        assert [one["index"] for one in predictions.gather(path)] == [0, 1]

    @pytest.mark.slow
    def test_a_real_limit(self, model, tmp_path):
        """The system's own error, in a process of its own: no file may grow beyond some blocks."""
        data, out = write_longbench(tmp_path / "data", ["trec"], samples=40), tmp_path / "out"
        given = ["eval", "longbench", "--model", model, "--data", data, "--no-chat", "--tasks", "trec"]
        given += ["--policies", "streaming", "--budgets", "144", "--device", "cpu", "--limit", "40", "--out", out]
        program = (
            "import resource, sys\n"
            "from attention_predictor.cli import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (12288, 12288))\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, given)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        said = done.stderr.strip().splitlines()[-1]
        assert said == f"attnpred eval: {out / 'streaming-144' / 'trec.jsonl'}: can't be written: File too large"
        predictions.cut_torn_line(out / "streaming-144" / "trec.jsonl")
        kept = [one["index"] for one in RunFolder(out).records("streaming-144", "trec")]
        assert kept == list(range(len(kept)))
        assert 0 < len(kept) < 40

    @pytest.mark.slow
    def test_a_training_keeps_its_state_and_goes_on(self, tmp_path, monkeypatch, capsys):
        make_recording(tmp_path / "data", 4)
        given = ["train", "--data", tmp_path / "data", "--steps", 6, "--batch", 4, "--log-every", 2, "--device", "cpu"]
        given += ["--json", "--out"]
        with monkeypatch.context() as patch:
            full_after(patch, predictions, 2, errno.ENOSPC)  # the states of steps 0 and 2; that of step 4 does not fit
            line = refused(capsys, *given, tmp_path / "out")
        assert line.endswith(f"{tmp_path / 'out' / STATE_FILE}: can't be written: No space left on device")
        assert torch.load(tmp_path / "out" / STATE_FILE, weights_only=True)["step"] == 2
        assert {one.name for one in (tmp_path / "out").iterdir()} == {STATE_FILE, LOCK}
        assert run(*given, tmp_path / "out", "--resume") == 0
        continued = json.loads(capsys.readouterr().out)
        assert run(*given, tmp_path / "whole") == 0
        whole = json.loads(capsys.readouterr().out)
        assert {**continued, "out": None} == {**whole, "out": None}

    def test_a_predictor_stays_whole_where_another_does_not_fit(self, tmp_path, monkeypatch):
        predictor = AttentionPredictor.from_pretrained("default")
        predictor.save(tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        for number in range(2):
            with monkeypatch.context() as patch:
                full_after(patch, predictions, number, errno.ENOSPC)
                predictor.training_facts = {"more": number}
                with pytest.raises(ValueError, match=r"can't save a predictor here: .*No space left on device"):
                    predictor.save(tmp_path)
            assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    @pytest.mark.slow
    def test_a_recording_keeps_its_documents_and_goes_on(self, tmp_path, monkeypatch, capsys):
        words = " ".join(f"word{number}" for number in range(4000))
        for name in "abc":
            (tmp_path / "texts").mkdir(exist_ok=True)
            (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} {words}")
        given = ["record", "--data", tmp_path / "texts", "--out", tmp_path / "out", "--max-tokens", 400, "--steps", 70]
        given += ["--per-file", 1, "--device", "cpu", "--budgets", 160]
        with monkeypatch.context() as patch:
            replace, calls = os.replace, iter(range(100))

            def failing(source: object, target: object) -> None:
                if next(calls) >= 2:  # behind a shard and meta.json
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                replace(source, target)

            patch.setattr(dataset_module.os, "replace", failing)
            line = refused(capsys, *given)
        assert line.startswith(f"attnpred record: {tmp_path / 'out' / 'shards'}")
        assert line.endswith(".parquet: can't be written: No space left on device")
        assert HistoryDataset(tmp_path / "out").documents == ["a.txt#0"]
        assert run(*given) == 0
        assert HistoryDataset(tmp_path / "out").documents == ["a.txt#0", "b.txt#0", "c.txt#0"]

    def test_a_run_of_recovery_keeps_its_variants(self, model, tmp_path, monkeypatch, capsys):
        texts, out = write_texts(tmp_path / "texts", 1), tmp_path / "out"
        given = ["eval", "recovery", "--model", model, "--data", texts, "--tail", 8, "--context", 300]
        given += ["--device", "cpu", "--budgets", 144, "--recovery", 4, "--out", out]
        given += ["--rule", "streaming", "--rule", "predictor"]

        def done() -> list[str]:
            folder = RunFolder(out)
            return [one for one in folder.variants if folder.records(one, "texts")]

        with monkeypatch.context() as patch:
            full_after(patch, predictions, 2, errno.ENOSPC)  # run.json, one sample
            capsys.readouterr()
            assert run(*given) == 2
        path = out / "predictor-144" / "texts.jsonl"
        assert capsys.readouterr().err.endswith(f"attnpred eval: {path}: can't be written: No space left on device\n")
        kept = RunFolder(out).records("streaming-144", "texts")
        assert len(kept) == 1
        assert run(*given) == 0
        assert RunFolder(out).records("streaming-144", "texts") == kept  # with its seconds: it did not run again
        assert done() == ["streaming-144", "predictor-144"]


def attnpred(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line, in a shell; ``attnpred`` is this checkout's."""
    program = f'attnpred() {{ {sys.executable} -m attention_predictor.cli "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=False, env=os.environ | environment
    )


class TestStandardOutput:
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    @pytest.mark.parametrize(
        "command",
        [
            "attnpred --help",
            "attnpred bench decode --help",
            "attnpred generate --prompt 'The door' --max-new-tokens 3 --json",
            "attnpred generate --prompt 'The door' --max-new-tokens 3",
        ],
    )
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_that_can_hold_nothing(self, command, unbuffered):
        done = attnpred(f"{command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].endswith(": No space left on device")

    @pytest.mark.parametrize("command", ["attnpred --help", "attnpred eval needle --help"])
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_whose_reader_is_gone(self, command, unbuffered):
        done = attnpred(f"{command} | true; exit ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
        assert done.returncode in (0, 141)
        assert done.stderr == ""

    @pytest.mark.slow
    def test_standard_error_that_can_hold_nothing(self):
        done = attnpred("attnpred generate --prompt 'The door' --max-new-tokens 3 --json 2> /dev/full")
        assert done.returncode == 0
        assert len(json.loads(done.stdout)["tokens"]) == 3

    def test_text_that_its_encoding_lacks(self, capsys, tmp_path):
        name = tmp_path / "é漢"
        name.mkdir()
        write_jsonl(name / "trec.jsonl", [{"pred": "x", "answers": ["x"], "all_classes": ["x"], "length": 1}])
        done = attnpred(f"attnpred score longbench '{name}'", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        assert "\\xe9" in done.stdout


class TestLoneSurrogates:
    @pytest.mark.slow
    def test_in_an_answer_it_is_kept_and_the_run_goes_on(self, model, tmp_path):
        data, out = tmp_path / "data", tmp_path / "out"
        data.mkdir()
        rows = [longbench_row("qasper", number, answers=["plain", "\ud800"]) for number in range(2)]
        rows[1] |= {"_id": "\udfff", "length": 3}
        (data / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["eval", "longbench", "--model", model, "--data", data, "--no-chat", "--tasks", "qasper"]
        given += ["--policies", "full,streaming", "--budgets", 144, "--device", "cpu", "--out", out]
        assert run(*given) == 0
        text = (out / "full" / "qasper.jsonl").read_bytes().decode("utf-8")
        assert [json.loads(line)["answers"] for line in text.splitlines()] == [["plain", "\ud800"]] * 2
        assert "error" not in text
        before = (out / "full" / "qasper.jsonl").read_bytes()
        assert run(*given) == 0
        assert (out / "full" / "qasper.jsonl").read_bytes() == before
        assert run("score", "longbench", out) == 0
        assert run("report", out, "--out", tmp_path / "report") == 0

    @pytest.mark.parametrize("name", ["context", "input"])
    def test_in_a_prompt_it_is_refused_before_the_model_loads(self, name, model, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("attention_predictor.eval.harness.runner.load_model", None)
        data = tmp_path / "data"
        data.mkdir()
        rows = [longbench_row("qasper", 0), longbench_row("qasper", 1, **{name: "a \ud800"})]
        (data / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["eval", "longbench", "--model", model, "--data", data, "--no-chat", "--tasks", "qasper", "--out"]
        line = refused(capsys, *given, tmp_path / "out")
        assert line.endswith(
            f"{data / 'qasper.jsonl'}, line 2, {name!r}: not Unicode text, a lone surrogate: '\\ud800'"
        )

    @pytest.mark.parametrize(
        "row",
        [{"text": "a \ud800"}, {"text": "a", "continuations": ["b", "\udfff"]}, {"context": "a", "input": "\ud800"}],
    )
    def test_in_a_row_to_record(self, row, tmp_path, capsys):
        file = tmp_path / "rows.jsonl"
        file.write_text('{"text": "fine"}\n\n' + json.dumps(row) + "\n")
        line = refused(capsys, "record", "--data", file, "--out", tmp_path / "out")
        assert f"{file}, line 3: not Unicode text, a lone surrogate" in line

    def test_in_a_parquet_row(self, tmp_path, capsys):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        column = pa.Array.from_buffers(
            pa.string(), 2, [None, pa.array([0, 4, 7], pa.int32()).buffers()[1], pa.py_buffer(b"fine\xed\xa0\x80")]
        )
        file = tmp_path / "rows.parquet"
        parquet.write_table(pa.table({"text": column}), file)
        line = refused(capsys, "record", "--data", file, "--out", tmp_path / "out")
        assert str(file) in line

    @pytest.mark.parametrize("data", [b"fine\n\xed\xa0\x80", b"fine\n\xff"])
    def test_on_standard_input(self, data, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert "cannot read standard input: not UTF-8 text (line 2)" in refused(capsys, "generate")

    def test_on_the_command_line(self, capsys):
        assert "--prompt: not Unicode text, a lone surrogate" in refused(capsys, "generate", "--prompt", "a \udcff")

    def test_in_needles_passages_and_problems(self, model, tmp_path, capsys):
        texts, bad = write_texts(tmp_path / "texts"), "a \ud800"
        common = ["--model", model, "--no-chat", "--out", tmp_path / "out"]
        needles, squad = tmp_path / "needles.jsonl", tmp_path / "squad.jsonl"
        needles.write_text(json.dumps({"needle": bad, "question": "x?", "answer": "x"}))
        line = refused(capsys, "eval", "needle", "--data", texts, "--needles", needles, "--no-plot", *common)
        assert f"{needles}, line 1: not Unicode text" in line
        squad.write_text(json.dumps({"question": "x?", "answers": ["x"], "context": bad}))
        line = refused(capsys, "eval", "ruler", "--tasks", "qa_1", "--squad", squad, *common)
        assert f"{squad}, line 1: not Unicode text" in line
        (tmp_path / "vt.jsonl").write_text(json.dumps({"input": bad, "outputs": ["x"]}))
        line = refused(capsys, "eval", "ruler", "--data", tmp_path / "vt.jsonl", *common)
        assert "vt.jsonl, line 1: not Unicode text" in line
        (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": bad, "answer": "1"}))
        line = refused(capsys, "eval", "reasoning", "--data", tmp_path, "--model", model, "--out", tmp_path / "out")
        assert "gsm8k.jsonl, line 1: not Unicode text" in line


class TestByteOrderMarks:
    MARK = "\ufeff"

    def test_prompts(self, capsys, tmp_path, monkeypatch):
        def tokens(*arguments: object) -> list[int]:
            assert run("generate", "--max-new-tokens", 3, "--json", *arguments) == 0
            return json.loads(capsys.readouterr().out)["tokens"]

        expected = tokens("--prompt", "The ship sailed into the")
        file = tmp_path / "prompt.txt"
        file.write_text(self.MARK + "The ship sailed into the", encoding="utf-8")
        assert tokens("--prompt-file", file) == expected
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
        assert tokens() == expected

    def test_data_predictions_corpora_and_templates(self, model, tmp_path):
        plain, marked = tmp_path / "plain", tmp_path / "marked"
        for folder, mark in ((plain, ""), (marked, self.MARK)):
            write_longbench(folder, ["trec"], samples=2)
            for file in folder.iterdir():
                file.write_text(mark + file.read_text())
            (folder / "templates").write_text(mark + json.dumps({"trec": "{context} {input}"}))
            given = ["eval", "longbench", "--model", model, "--data", folder, "--no-chat", "--tasks", "trec"]
            given += ["--templates", folder / "templates", "--policies", "full", "--device", "cpu"]
            assert run(*given, "--out", folder / "out") == 0
        assert results(RunFolder(plain / "out")) == results(RunFolder(marked / "out"))
        line = json.dumps({"pred": "x", "answers": ["x"], "all_classes": ["x"], "length": 1}) + "\n"
        (tmp_path / "given").mkdir()
        (tmp_path / "given" / "trec.jsonl").write_text(self.MARK + line + line)
        assert run("score", "longbench", tmp_path / "given") == 0
        texts = write_texts(tmp_path / "texts", 1)
        (texts / "a.txt").write_text(self.MARK + (texts / "a.txt").read_text())
        given = ["eval", "perplexity", "--model", model, "--data", texts, "--context", 300, "--tail", 8]
        assert run(*given, "--policies", "full", "--device", "cpu", "--out", tmp_path / "perplexity") == 0

    def test_scores_of_layers(self, tmp_path):
        file = tmp_path / "scores.json"
        file.write_text(self.MARK + '{"bi": [3, 1, 2]}')
        assert run("prune", "--plan-only", "--scores", file, "--metric", "bi") == 0
