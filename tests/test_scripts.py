"""Scripts that a change of the library could break unnoticed."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from recordings import make_recording

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


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
