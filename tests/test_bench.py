"""attnpred bench: every part runs at a tiny size and gives figures of the right form; times are never judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attention_predictor.cli import main


@pytest.mark.parametrize("part", ["attention", "sketch", "gather"])
def test_bench(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--kv-heads", "2", "--heads", "4", "--head-dim", "32", "--context", "600"]
    assert main(["bench", part, *options, "--budget", "128", "--blocks", "20", "--repeats", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["part"] == part
    assert found["timings"][0]["name"].startswith("ours")
    assert all(one["ms"] > 0 and one["gb_per_s"] > 0 for one in found["timings"])
    assert main(["bench", part, "--heads", "3", "--kv-heads", "2"]) == 2
    assert capsys.readouterr().err == "attnpred bench: --heads 3: expected a multiple of --kv-heads 2\n"


def test_bench_decode(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--device", "cpu", "--context", "300", "--budget", "144", "--batch", "2"]
    assert main(["bench", "decode", *options, "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["timings"]] == ["ours", "ours, kernels=none", "stock cache on the device"]
    assert all(0 < one["median_ms"] <= one["p95_ms"] for one in found["timings"])
    assert found["timings"][0]["engine"]["steps"] == 7
    assert found["timings"][0]["engine"]["fallbacks"] == {}
    assert main(["bench", "decode", *options, "--steps", "400"]) == 2
    assert "--context 300: expected more than the 403 steps" in capsys.readouterr().err
