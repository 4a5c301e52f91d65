"""The examples run, and do what they say, with less than their defaults."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(name, *arguments)``: what an example prints."""

    def run(name: str, *arguments: object) -> str:
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


@pytest.mark.slow
def test_wrap_model(run: Run) -> None:
    """Within the budget both continue the prompt alike; beyond it blocks are left out, and the figures say so."""
    lines = run("wrap_model", "--context", 400, "--budget", 512, "--new-tokens", 8).splitlines()
    stock, offloaded = (line.partition(":")[2].strip() for line in lines if line.startswith(("stock", "offloaded")))
    assert stock == offloaded != ""
    said = run("wrap_model", "--context", 600, "--budget", 256, "--new-tokens", 4)
    assert "prompt of 600 tokens, budget 256" in said
    assert "hit rate" in said


@pytest.mark.slow
def test_train_predictor(run: Run, tmp_path: Path) -> None:
    sizes = ("--out", tmp_path, "--tokens", 400, "--steps", 4)
    said = run("train_predictor", *sizes)
    assert all(f"\n{rule}-256 " in said for rule in ("mine", "shipped", "last row"))
    weights = tmp_path / "predictor" / "model.safetensors"
    before = weights.stat()
    run("train_predictor", *sizes)
    assert weights.stat() == before


@pytest.mark.slow
def test_make_table(run: Run, tmp_path: Path) -> None:
    said = run("make_table", "--out", tmp_path, "--context", 800)
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|") and "%" not in line}
    assert {"full", "predictor", "streaming", "ahead only"} <= rows.keys()
    assert (tmp_path / "report" / "report.html").exists()
