"""A model divided among two processes, with gloo: the same tokens as in one, decided together, ended together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import POCKET
from rank_worker import CASES, NEW, generate, prompt
from tiny_models import make_tiny_model
from tiny_text_model import save_tiny_text_model

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.errors import ConfigError
from attention_predictor.launcher import FAILED, Launcher
from attention_predictor.loading import load_model
from attention_predictor.train.dataset import HistoryDataset

TESTS = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)  # several processes, each of which loads all libraries


def launcher() -> dict[str, str]:
    """What a launcher tells its two processes, without their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start(command: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    shared = os.environ | launcher() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended(ranks: list[subprocess.Popen[str]], within: float = 300) -> list[tuple[int, str, str]]:
    """Exit code and output of each rank."""
    try:
        printed = [rank.communicate(timeout=within) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *both) for rank, both in zip(ranks, printed, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: of two families, and one whose three KV heads two ranks can't divide."""
    path = tmp_path_factory.mktemp("models")
    even = {"vocab_size": 98}  # transformers 5.17 divides no other
    make_tiny_model("llama", **even).save_pretrained(path / "llama")
    make_tiny_model("qwen3", **even).save_pretrained(path / "qwen3")
    odd = {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 48}
    make_tiny_model("llama", **even, **odd).save_pretrained(path / "odd")
    save_tiny_text_model(path / "text", **even)
    return path


def results(topic: str, folder: Path) -> list[Any]:
    found = ended(start([str(TESTS / "rank_worker.py"), topic, str(folder)]))
    assert [code for code, _, _ in found] == [0, 0], found
    return [torch.load(folder / f"{topic}-{rank}.pt") for rank in range(2)]


def _by_head(budget: int | tuple[int, ...], heads: int) -> tuple[int, ...]:
    return (budget,) * heads if isinstance(budget, int) else budget


def test_two_ranks_give_what_one_process_gives(folder: Path) -> None:
    both = results("tokens", folder)
    for family in ("llama", "qwen3"):
        model = load_model(str(folder / family), "cpu", "float32")
        for name, settings in CASES.items():
            alone, ranks = generate(model, settings), [one[family][name] for one in both]
            for rank in ranks:
                assert rank["tokens"] == alone["tokens"], (family, name)
                assert 2 * rank["host"] == alone["host"], (family, name)
                assert 2 * rank["needs"] == alone["needs"], (family, name)
                assert rank["fallbacks"] == alone["fallbacks"]
            for layer, budget in alone["budgets"].items():
                own = [_by_head(rank["budgets"][layer], 1) for rank in ranks]
                assert own[0] + own[1] == _by_head(budget, 2), (family, name)
        with attach(model, OffloadConfig(budget=96, sink=16, recent=16, slab_blocks=4)) as engine:
            seeded = engine.generate(prompt(), seed=5, max_new_tokens=NEW, temperature=1.0)
        assert both[0][family]["seeded"] == both[1][family]["seeded"] == seeded.tolist()
        assert both[0][family]["unseeded"] == both[1][family]["unseeded"] != seeded.tolist()
        assert both[0][family]["by transformers"] == both[1][family]["by transformers"]


def test_what_one_rank_refuses_all_refuse(folder: Path) -> None:
    first, second = results("decisions", folder)
    assert first["a predictor on one rank"].startswith("CheckpointError: rank 1: ")
    assert second["a predictor on one rank"].startswith("CheckpointError: ")
    assert "nowhere" in second["a predictor on one rank"]
    for name in ("host memory", "host memory of a forward"):
        assert first[name].startswith("HostMemoryError: rank 1: the KV cache of 1"), first[name]
        assert second[name].startswith("HostMemoryError: the KV cache of 1"), second[name]
    for one in (first, second):
        assert "divided among 2 ranks: expected compile=False" in one["compile"]
        assert one["heads given"] == "ConfigError: budget_allocation has 4 budgets in a layer: it has 2 KV heads"
        assert one["heads"].startswith("AttachError: LlamaForCausalLM has 3 KV heads, which 2 ranks can't divide")
        assert one["left as it was"] != "attention_predictor"
        assert "262" in one["after"]


def test_steps_are_captured_by_all_ranks_or_by_none(folder: Path) -> None:
    both = results("capture", folder)
    model = load_model(str(folder / "llama"), "cpu", "float32")
    alone = generate(model, {"budget": 96})
    for rank in both:
        assert rank["captured"]["tokens"] == rank["not captured"]["tokens"] == alone["tokens"]
        assert rank["captured"]["fallbacks"] == rank["by head"]["fallbacks"] == {}
        assert list(rank["not captured"]["fallbacks"]) == ["the prefetch thread in place of captured steps: no kernels"]
        assert rank["exchanges"] == rank["exchanges of more steps"]  # none at each step


def test_a_capture_that_fails_on_one_rank_fails_on_all(folder: Path) -> None:
    first, second = results("capture_fails", folder)
    for rank, who in ((first, "rank 1: "), (second, "")):
        [noted] = rank["failed"]["fallbacks"]
        reason = f"LlamaForCausalLM can't be captured: {who}this rank reads a value"
        assert noted == f"the prefetch thread in place of captured steps: {reason}"
        assert rank["refused"] == f"HostMemoryError: {who}nothing is left"
    alone = generate(load_model(str(folder / "llama"), "cpu", "float32"), {"budget": 96})
    assert first["failed"]["tokens"] == second["failed"]["tokens"] == alone["tokens"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.usefixtures("exact_matmul")
def test_captured_steps_of_two_gpus(folder: Path) -> None:
    first, second = results("on_gpus", folder)
    model = load_model(str(folder / "llama"), "cuda", "float32")
    with attach(model, OffloadConfig(budget=4096)) as engine:
        alone = engine.generate(prompt(), max_new_tokens=4 * NEW).tolist()
    assert first["whole context"][0] == alone
    for name, (tokens, captured, fallbacks) in first.items():
        assert second[name][0] == tokens, name
        assert second[name][1] == captured, name
        if name == "failed":
            [noted] = fallbacks
            assert noted.endswith("can't be captured: rank 1: this rank reads a value")
        else:
            assert captured > 0, (name, fallbacks)
            assert not fallbacks, name
    assert first["failed"][0] == first["predictor"][0]


COMMAND = ["-m", "attention_predictor.cli"]


@pytest.mark.slow
def test_the_command_line_prints_once_what_one_process_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (POCKET.parents[1] / "scripts" / "demo_text.txt").read_text("utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text(text[:40_000], "utf-8")
    (tmp_path / "prompt.txt").write_text(text[:3000], "utf-8")
    shared = ["--model", str(POCKET), "--device", "cpu"]
    run = ["generate", *shared, "--prompt-file", str(tmp_path / "prompt.txt"), "--budget", "256"]
    run += ["--max-new-tokens", "12", "--temperature", "0.7"]
    measure = ["eval", "perplexity", *shared, "--data", str(tmp_path / "texts"), "--context", "600", "--limit", "1"]
    measure += ["--policies", "full,cake", "--budgets", "256", "--out"]
    for command, alone, among in (
        (run, [], []),
        (measure, [str(tmp_path / "alone")], [str(tmp_path / "among"), "--tp"]),
    ):
        assert main([*command, *alone]) == 0
        printed = capsys.readouterr().out
        (code, out, error), (other, nothing, _) = ended(start([*COMMAND, *command, *among]))
        assert (code, other) == (0, 0), error
        assert out == printed
        assert nothing == ""


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["sparse", "full"])
def test_a_divided_model_is_recorded_as_a_whole_one(folder: Path, tmp_path: Path, rows: str) -> None:
    text = (POCKET.parents[1] / "scripts" / "demo_text.txt").read_text("utf-8")
    (data := tmp_path / "data").mkdir()
    for number in range(2):
        (data / f"{number}.txt").write_text(text[number * 12_000 : (number + 1) * 12_000], "utf-8")
    command = ["record", "--model", str(POCKET), "--device", "cpu", "--data", str(data), "--per-file", "1"]
    command += ["--max-tokens", "500", "--steps", "80", "--rows", rows, "--budgets", "256", "--validation", "0"]
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    (code, out, error), (other, nothing, _) = ended(
        start([*COMMAND, *command, "--tp", "--out", str(tmp_path / "among")])
    )
    assert (code, other, nothing) == (0, 0, ""), error
    assert out.count("recording 2 documents") == 1
    alone, among = (HistoryDataset(tmp_path / name) for name in ("alone", "among"))
    assert alone.documents == among.documents
    assert len(alone.documents) == 2
    for document in alone.documents:
        one, divided = alone.load(document), among.load(document)
        assert (one.layers, one.heads, one.sequences) == (divided.layers, divided.heads, divided.sequences)
        assert (one.mass_XQN - divided.mass_XQN).abs().max() < 1e-2  # sums over ranks differ in their last bits
        assert (one.scores_XQN - divided.scores_XQN).abs().mean() < 1e-4


def test_the_command_line_says_once_what_is_wrong(folder: Path) -> None:
    commands = (["--model", str(folder / "odd"), "--prompt", "some words"], ["--prompt", " "])
    for command, reason in zip(commands, ("cannot load a tokenizer", "the prompt from --prompt is empty"), strict=True):
        found = ended(start([*COMMAND, "generate", *command]))
        assert all(code for code, _, _ in found)
        said = [error for _, _, error in found if "attnpred generate: " in error]
        assert len(said) == 1, found
        assert reason in said[0]


@pytest.mark.parametrize("agent", [False, True])
def test_the_process_that_keeps_the_store_ends_after_the_others_have_asked(
    monkeypatch: pytest.MonkeyPatch, agent: bool
) -> None:
    """If it ended before, they would not know that it has said why. torchrun's agent keeps the store itself."""
    for name, value in (launcher() | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": str(agent)}).items():
        monkeypatch.setenv(name, value)
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(store, 0, 2)]))
    other = threading.Timer(0.3, store.add, (FAILED, 1))
    other.start()
    process = Launcher()
    with pytest.raises(ConfigError, match="wrong"), process.as_one():
        raise ConfigError("wrong")
    assert store.add(FAILED, 0) == 2 - agent
    other.join()
    with pytest.raises(SystemExit), process.as_one():
        raise ConfigError("a second time")


def test_a_rank_without_memory_ends_the_other_and_says_so(folder: Path) -> None:
    started = time.perf_counter()
    (first, _, quiet), (second, _, said) = ended(
        start([str(TESTS / "rank_worker.py"), "out_of_memory", str(folder)]), within=60
    )
    assert (first, second) == (1, 2)
    assert said.splitlines()[-1] == "attnpred generate: process 1 of 2: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "attnpred generate:" not in quiet
    assert time.perf_counter() - started < 60


def test_an_interrupt_ends_both_with_one_line(folder: Path) -> None:
    ranks = start([str(TESTS / "rank_worker.py"), "waits", str(folder)])
    until = time.perf_counter() + 120
    while len([*folder.glob("waits-*")]) < 2 and time.perf_counter() < until:
        time.sleep(0.1)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)  # as a launcher does, and the terminal
    found = ended(ranks, within=30)
    assert [code for code, _, _ in found] == [130, 130], found
    assert sum(error.count("attnpred generate: interrupted") for _, _, error in found) == 1, found


def test_what_a_launcher_has_not_set_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: nothing is loaded before the environment is looked at."""
    command = ["generate", "--model", str(folder / "llama"), "--prompt", "some words"]
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        with pytest.raises(ConfigError, match=f"^{name} is not set, but WORLD_SIZE=2"):
            Launcher()
        assert main(command) == 2
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="LOCAL_RANK is not set"):
        load_model(str(folder / "llama"), ranks=2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="it has 3 KV heads, allowed are numbers of processes that divide 3"):
        load_model(str(folder / "odd"), ranks=2)


def test_a_rank_that_fails_ends_the_other(folder: Path) -> None:
    started = time.perf_counter()
    (first, _, _), (second, _, reason) = ended(start([str(TESTS / "rank_worker.py"), "dies", str(folder)]), within=60)
    assert first
    assert second
    assert "this rank has failed" in reason
    assert time.perf_counter() - started < 60


@pytest.mark.slow
def test_timings_of_a_divided_random_model(tmp_path: Path) -> None:
    """Each rank makes its part; the first one prints and writes."""
    out = tmp_path / "rows.jsonl"
    options = [
        "--shape",
        "tiny",
        "--context",
        "512",
        "--budget",
        "160",
        "--synthetic",
        "--steps",
        "3",
        "--device",
        "cpu",
    ]
    command = [*COMMAND, "bench", "decode", *options, "--ways", "ours,device", "--json"]
    (code, printed, _), (other_code, other_printed, _) = ended(start([*command, "--out", str(out)]))
    assert (code, other_code, other_printed) == (0, 0, "")
    found = json.loads(printed)
    ours, device = found["timings"]
    # Of two layers, with one of two KV heads on each rank; the last three steps are profiled, not counted.
    assert ours["engine"]["full_kv_bytes"] == 2 * 2 * 509 * 64 * 4
    assert ours["weights_bytes"] == device["weights_bytes"] > 0
    settings, *rows = (json.loads(line) for line in out.read_text().splitlines())
    assert settings["settings"]["machine"].endswith(", 2 of them")
    assert [row["way"] for row in rows] == ["ours", "device"]
