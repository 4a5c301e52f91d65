"""What tests of benchmarks share: texts, commands that must be refused, and the records of a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from attention_predictor.cli import main
from attention_predictor.eval.harness import runner
from attention_predictor.eval.harness.run_folder import RunFolder


def make_text(seed: int = 0, sentences: int = 400) -> str:
    """Plain sentences in paragraphs of four; ASCII alone, without digits."""
    rng = random.Random(seed)
    line = "the grey river ran past a mill and nobody saw boats when rain fell over quiet old fields"
    words = line.split()
    made = []
    for number in range(sentences):
        sentence = " ".join(rng.choice(words) for _ in range(rng.randint(5, 14))).capitalize() + rng.choice(".!?")
        made.append(sentence + ("\n\n" if number % 4 == 3 else " "))
    return "".join(made).strip()


def write_texts(folder: Path, count: int = 2, sentences: int = 400) -> Path:
    """Text files ``a.txt``, ``b.txt``, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = chr(ord("a") + number)
        (folder / f"{name}.txt").write_text(make_text(number, sentences), encoding="utf-8")
    return folder


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run a benchmark that must be refused before its model is loaded; returns the one line it says."""

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runner, "load_model", load)
    try:
        code = main(["eval", *map(str, arguments)])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2, captured
    (line,) = captured.err.strip().splitlines()
    return line


def evaluate(*arguments: object) -> None:
    """Run a benchmark that must succeed."""
    assert main(["eval", *map(str, arguments)]) == 0


def results(folder: RunFolder) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All records, without what differs from run to run."""
    return {
        (variant, task): [
            {name: value for name, value in one.items() if name not in ("seconds", "exposed_wait_ms")}
            for one in folder.records(variant, task)
        ]
        for variant in folder.variants
        for task in folder.tasks
    }
