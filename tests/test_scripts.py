"""Scripts that a change of the library could break unnoticed."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_runs import write_texts
from recordings import make_recording
from tiny_text_model import save_tiny_text_model, write_longbench

from attention_predictor.eval.folder import RunFolder
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


def test_reproduce_pocket_says_what_is_missing(tmp_path: Path) -> None:
    script = str(SCRIPTS / "reproduce_pocket.sh")
    for arguments, said in (
        ([], "expected DATA OUT [DEVICE [MORE…]]"),
        ([str(tmp_path), str(tmp_path / "out")], f"{tmp_path}/texts: no such directory"),
    ):
        done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"reproduce_pocket.sh: {said}\n"
