"""Models that can't be loaded as they are, and what can be done about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_text_model import save_tiny_text_model

from attention_predictor.cli import main
from attention_predictor.errors import CheckpointError
from attention_predictor.loading import load_config, load_model, load_tokenizer

COMMANDS = [
    ("generate", "--prompt", "x"),
    ("record", "--data", ".", "--out", "x"),
    ("eval", "needle", "--data", "x", "--out", "y", "--no-plot"),
    ("eval", "recovery", "--data", "x"),
    ("analyze", "--data", "x", "--out", "y"),
    ("prune", "--data", "x", "--layers", "1", "--out", "y"),
    ("bench", "decode"),
    ("bench", "prefill"),
    ("bench", "requests"),
]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    folder = tmp_path / "model-GGUF"
    folder.mkdir()
    for name in ("model-Q4_K_M.gguf", "model-Q8_0.gguf", "README.md"):
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("what", ["file", "directory"])
def test_gguf_files(command, what, gguf, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = gguf if what == "directory" else gguf / "model-Q8_0.gguf"
    assert main([*command, "--model", str(name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    file = "model-Q8_0.gguf" if what == "file" else "model-Q4_K_M.gguf"
    assert line.startswith(
        f"attnpred {command[0]}: {str(name)!r} is a model in GGUF: convert it once with transformers"
    )
    for part in ("AutoModelForCausalLM", "AutoTokenizer"):
        assert f"{part}.from_pretrained({str(gguf)!r}, gguf_file={file!r}).save_pretrained('converted')" in line


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
def test_libraries_are_told_the_same(load, gguf):
    with pytest.raises(CheckpointError, match="is a model in GGUF"):
        load(str(gguf))
    with pytest.raises(CheckpointError, match=r"GGUF files need gguf_file=… of transformers"):
        load("someone/Model-GGUF")


def test_a_model_with_gguf_files_beside_it_is_loaded(tmp_path):
    folder = save_tiny_text_model(tmp_path / "model")
    (folder / "model.gguf").write_bytes(b"GGUF")
    load_model(str(folder))
    load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_configuration_that_is_nested_too_deeply(name, tmp_path):
    folder = save_tiny_text_model(tmp_path / "model")
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(str(folder))
        load_model(str(folder))
    assert "\n" not in str(caught.value)
