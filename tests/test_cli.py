"""The command line: one JSON object, one line and exit code 2 for bad input, and the real thing end to end."""

from __future__ import annotations

import argparse
import io
import json
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import POCKET
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from attention_predictor import cli, writing
from attention_predictor.cli import COMMANDS, main, make_parser
from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.generate import _run
from attention_predictor.loading import load_model
from attention_predictor.predictor.model import AttentionPredictor


def fails(capsys, *arguments: str) -> str:
    """Run a command that must refuse its input; returns its one line."""
    try:
        code = main([str(one) for one in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def generate(capsys, *arguments: str) -> dict:
    assert main(["generate", "--json", *[str(one) for one in arguments]]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, *{"eval": ["recovery"], "bench": ["decode"]}.get(command, []), "--help"])
    assert stop.value.code == 0
    _, examples = capsys.readouterr().out.split("examples:\n")
    assert examples.startswith(f"  attnpred {command} ")


def test_help_and_version(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
    assert "generate" in capsys.readouterr().out


class TestGenerate:
    def test_json(self, capsys):
        result = generate(capsys, "--prompt", "The door opened and", "--max-new-tokens", 12)
        assert set(result) == {"text", "tokens", "prompt_tokens", "stats"}
        assert len(result["tokens"]) == 12
        assert result["prompt_tokens"] == 5
        assert result["stats"]["device_kv_bytes"] > 0

    @pytest.mark.slow
    def test_offloading_changes_nothing_within_the_budget(self, capsys):
        options = ("--prompt", "It was the", "--max-new-tokens", 20)
        assert generate(capsys, *options)["tokens"] == generate(capsys, *options, "--no-offload")["tokens"]

    def test_prompt_from_a_file_and_from_standard_input(self, capsys, tmp_path, monkeypatch):
        file = tmp_path / "prompt.txt"
        file.write_text("The ship sailed into the", encoding="utf-8")
        one = generate(capsys, "--prompt-file", file, "--max-new-tokens", 5)
        monkeypatch.setattr(sys, "stdin", io.StringIO("The ship sailed into the"))
        assert generate(capsys, "--max-new-tokens", 5)["tokens"] == one["tokens"]

    @pytest.mark.slow
    def test_sampling_is_reproducible(self, capsys):
        options = ("--prompt", "Once", "--max-new-tokens", 16, "--temperature", 1.0)
        one, two = generate(capsys, *options, "--seed", 3), generate(capsys, *options, "--seed", 3)
        assert one["tokens"] == two["tokens"] != generate(capsys, *options, "--seed", 4)["tokens"]

    def test_text_and_closing_table(self, capsys):
        assert main(["generate", "--prompt", "The old house", "--max-new-tokens", "8", "--recovery"]) == 0
        captured = capsys.readouterr()
        assert captured.out.strip()
        for word in ("tokens/s", "hit rate", "fetched per token", "exposed wait", "KV on the device", "recovery"):
            assert word in captured.err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--prompt-file", "nowhere.txt"), "cannot read prompt file nowhere.txt: No such file"),
            (("--prompt", "  "), "the prompt from --prompt is empty"),
            (("--prompt", "x", "--policy", "best"), "--policy best: expected one of full, streaming"),
            (("--prompt", "x", "--budget", "100"), "--budget 100: expected at least"),
            (("--prompt", "x", "--budget", "abc"), "--budget abc: expected an integer"),
            (("--prompt", "x", "--block-size", "12"), "--block-size 12: expected a power of two"),
            (("--prompt", "x", "--sink", "10"), "--sink 10: expected a multiple of block_size=16"),
            (("--prompt", "x", "--recent", "-16"), "--recent -16: expected at least 0"),
            (("--prompt", "x", "--late-fetch", "x"), "--late-fetch x: expected a share from 0 to 1"),
            (("--prompt", "x", "--prompt-file", "y"), "argument --prompt-file: not allowed with argument --prompt"),
            (("--prompt", "x", "--speed", "1"), "unrecognized arguments: --speed 1"),
            (("--prompt", "x", "--late-fetch", "-1"), "--late-fetch -1: expected a share from 0 to 1"),
            (("--prompt", "x", "--calibration", "no"), "--calibration no: expected one of sketch, exact, none"),
            (("--prompt", "x", "--prefetch", "no"), "--prefetch no: expected one of auto, thread, graph, none"),
            (("--prompt", "x", "--predictor", "nowhere"), "nowhere: no such checkpoint"),
            (("--prompt", "x", "--model", "nowhere/at-all"), "cannot load a tokenizer from 'nowhere/at-all'"),
            (("--prompt", "x", "--device", "abacus"), "device='abacus' can't be used"),
            (("--prompt", "x", "--dtype", "int3"), "--dtype int3: expected one of auto, float32"),
            (("--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens 0: expected at least 1"),
            (("--prompt", "x", "--temperature", "-2"), "--temperature -2: expected 0, or 1e-06 or more"),
            (("--prompt", "x", "--seed", str(2**64)), "--seed 18446744073709551616: expected an integer of 64 bits"),
            (("--prompt", "x", "--budget", str(2**70)), "--budget 1180591620717411303424: expected an integer"),
            (("--prompt", "x", "--temperature", "1e-300"), "--temperature 1e-300: expected 0, or 1e-06 or more"),
            (("--prompt", "x", "--no-offload", "--recovery"), "--recovery: --no-offload runs the stock model"),
            (("--prompt", "x", "--no-offload", "--host-kv", "int8"), "--host-kv: --no-offload runs the stock model"),
            (("--prompt", "x", "--max-new", "3"), "unrecognized arguments: --max-new 3"),
            (("--prompt", "x", "--chat"), "has no chat template"),
            (("--prompt", "x", "--max-new-tokens", "20000"), "the model has positions for 10240"),
            (("--prompt", "x", "--max-new-tokens", "20000", "--no-offload"), "the model has positions for 10240"),
        ],
    )
    def test_bad_input(self, capsys, arguments, message):
        assert message in fails(capsys, "generate", *arguments)

    def test_empty_and_binary_prompt_files(self, capsys, tmp_path):
        file = tmp_path / "prompt.txt"
        file.touch()
        assert "is empty" in fails(capsys, "generate", "--prompt-file", file)
        file.write_bytes(b"\xff\xfe\x00")
        assert "not UTF-8 text" in fails(capsys, "generate", "--prompt-file", file)

    def test_damaged_predictor(self, capsys, tmp_path):
        checkpoint = tmp_path / "predictor"
        AttentionPredictor.from_pretrained("default").save(checkpoint)
        weights = checkpoint / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        line = fails(capsys, "generate", "--prompt", "x", "--predictor", checkpoint)
        assert "model.safetensors" in line

    def test_damaged_model(self, capsys, tmp_path):
        model = tmp_path / "model"
        shutil.copytree(POCKET, model)
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert "cannot load a causal language model" in fails(capsys, "generate", "--prompt", "x", "--model", model)

    @pytest.mark.parametrize("tied", [True, False])
    def test_model_without_all_its_weights(self, tmp_path, tied):
        make_tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
        load_model(str(tmp_path))  # the output weights may be missing where they are the embedding's
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        assert ("lm_head.weight" in weights) is not tied
        lost = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(2) for name in "kqv"]
        for count in (1, 6):
            save_file({k: v for k, v in weights.items() if k not in lost[:count]}, file, metadata={"format": "pt"})
            with pytest.raises(CheckpointError) as caught:
                load_model(str(tmp_path))
            named = ", ".join(lost[: min(count, 3)]) + (" and 3 more" if count == 6 else "")
            assert str(caught.value) == f"{str(tmp_path)!r} lacks weights that its model needs: {named}"

    def test_host_memory(self, capsys, monkeypatch):
        import psutil

        nothing = type("Memory", (), {"available": 1 << 20})()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: nothing)
        line = fails(capsys, "generate", "--prompt", "x", "--max-new-tokens", "9000")
        assert "of host memory: the system has available 0 bytes" in line


def test_interrupt(capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("attention_predictor.generate.load_tokenizer", interrupt)
    assert main(["generate", "--prompt", "x"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "attnpred generate: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "attnpred: the following arguments are required: COMMAND (see attnpred --help)"),
        (("eval",), "attnpred eval: the following arguments are required: {longbench,"),
        (("sing",), "attnpred: argument COMMAND: invalid choice: 'sing'"),
    ],
)
def test_no_such_command(capsys, arguments, line):
    assert fails(capsys, *arguments).startswith(line)


def test_the_installed_command():
    result = subprocess.run(
        [sys.executable, "-m", "attention_predictor.cli", "generate", "--prompt", "x", "--policy", "best"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("attnpred generate: --policy best: expected one of")


class TestRecordTrainEval:
    """The three commands in a row, as a user would run them, on little data."""

    @pytest.fixture(scope="class")
    def texts(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("texts")
        words = (POCKET.parents[1] / "scripts" / "demo_text.txt").read_text(encoding="utf-8")
        for number in range(4):
            (folder / f"part{number}.txt").write_text(words[number * 5000 : (number + 1) * 5000], encoding="utf-8")
        return folder

    @pytest.mark.slow
    @pytest.mark.usefixtures("all_cores")
    def test_round_trip(self, texts, tmp_path, capsys):
        histories, checkpoint = tmp_path / "histories", tmp_path / "checkpoint"
        record = ["record", "--data", texts, "--out", histories, "--max-tokens", 512, "--steps", 72]
        record += ["--per-file", 1, "--validation", 0.5]
        assert main([str(one) for one in record]) == 0
        shards = sorted((histories / "shards").iterdir())
        times = [shard.stat().st_mtime_ns for shard in shards]
        assert len(shards) == 4
        assert main([str(one) for one in record]) == 0  # again: nothing is recorded twice
        assert [shard.stat().st_mtime_ns for shard in sorted((histories / "shards").iterdir())] == times
        capsys.readouterr()
        train = ["train", "--data", str(histories), "--out", str(checkpoint), "--steps", "4", "--batch", "8", "--json"]
        assert main(train) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["steps"] == 4
        assert AttentionPredictor.from_pretrained(checkpoint).training_facts["recorded_from"] == "pocket-lm"
        run = tmp_path / "questions"
        judge = ["eval", "recovery", "--data", texts, "--tasks", "kv", "--questions", 4, "--per-document", 4]
        judge += ["--context", 1500, "--budgets", 256, "--recovery", 2, "--out", run, "--rule", "full"]
        judge += ["--rule", f"mine: predictor,predictor={checkpoint}", "--rule", "streaming"]
        assert main([str(one) for one in judge]) == 0
        folder = RunFolder(run)
        records = {variant: folder.records(variant, "kv")[0] for variant in folder.variants}
        assert sum(records["full"]["found"]) >= 3
        assert sum(records["streaming-256"]["found"]) <= 1
        assert 0.5 < records["mine-256"]["relative_recovery"] <= 1
        assert "\nmine-256 " in capsys.readouterr().out
        assert folder.description["settings"]["context"] == 1500
        assert " at 0x" not in json.dumps(folder.description)  # else another process would refuse the directory
        judge[judge.index(1500)] = 1400
        assert "settings.context is 1500 there, asked for 1400" in fails(capsys, *judge)
        tails = ["eval", "recovery", "--data", texts, "--tail", 12, "--context", 1000, "--budgets", 256]
        run = tmp_path / "tails"
        assert main([str(one) for one in [*tails, "--out", run, "--rule", "last: predictor,predictor=last"]]) == 0
        assert "relative ±" in capsys.readouterr().out
        folder = RunFolder(run)
        (task,) = folder.tasks
        records = folder.records("last-256", task)
        assert not any("found" in one for one in records)
        assert all(0.5 < one["relative_recovery"] <= 1 for one in records)
        assert "no document has 8192 tokens" in fails(capsys, *tails[:-4], "--context", 8192)
        assert "--tail 12: expected" in fails(capsys, *tails[:-4], "--context", 8)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("record", "--data", "nowhere", "--out", "x"), "nowhere"),
            (("record", "--data", ".", "--out", "x", "--max-tokens", 200), "--max-tokens 200: expected more than"),
            (("record", "--data", ".", "--out", "x", "--steps", 64), "--steps above 64"),
            (
                ("record", "--data", ".", "--out", "x", "--budgets", "few"),
                "expected numbers from 1 on, separated by commas",
            ),
            (("record", "--data", ".", "--out", "x", "--predictor", "best"), "best: no such checkpoint"),
            (("train", "--data", "nowhere", "--out", "x"), "nowhere"),
            (("eval", "recovery", "--data", "nowhere"), "cannot read text from nowhere"),
            (("eval", "recovery", "--data", "x", "--rule", "best"), "policy='best'"),
            (("eval", "recovery", "--data", "x", "--rule", "full,speed=1"), "unknown field 'speed'"),
            (
                ("eval", "recovery", "--data", "x", "--rule", "quest,budget=big"),
                "budget='big' is not allowed: expected an integer",
            ),
            (
                ("eval", "recovery", "--data", "x", "--budgets", "few"),
                "expected numbers from 1 on, separated by commas",
            ),
        ],
    )
    def test_bad_input(self, capsys, arguments, message, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert message in fails(capsys, *arguments)

    def test_a_missing_package_names_the_extra(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "accelerate", None)
        for name in [name for name in sys.modules if name.startswith("attention_predictor.train.")]:
            monkeypatch.delitem(sys.modules, name)
        assert "needs accelerate: pip install" in fails(capsys, "train", "--data", "x", "--out", "y")

    def test_a_line_that_is_no_document(self, capsys, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text('{"text": "fine"}\n{"words": 3}\n')
        assert "data.jsonl, line 2: expected text in 'text' (--field)" in fails(
            capsys, "record", "--data", file, "--out", tmp_path / "out"
        )

    def test_documents_that_are_all_too_short(self, capsys, tmp_path):
        (tmp_path / "a.txt").write_text("short")
        main(["record", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
        assert "no document" in capsys.readouterr().err


def test_processes_do_not_share_standard_input() -> None:
    """Each would read a part of it."""
    args, launcher = argparse.Namespace(prompt=None, prompt_file=None), SimpleNamespace(count=2)
    with pytest.raises(ConfigError, match="2 processes can't share standard input; allowed are --prompt"):
        _run(args, launcher)


# Commands that write, with what else they need: (option, whether it names a directory), in words of the command line.
WRITING = {
    "analyze": ("--data d", {"--out": True, "--plot": False}),
    "prune": ("--layers 1 --data d --sweep d", {"--out": True, "--plot": False}),
    "record": ("--data d", {"--out": True}),
    "report": ("run", {"--out": True}),
    "train": ("--data d", {"--out": True}),
    "bench decode": ("--shape tiny", {"--out": False, "--plot": False}),
    "bench policies": ("--shape tiny", {"--out": False}),
    "bench throughput": ("--shape tiny", {"--out": False, "--plot": False}),
    "eval continuation": ("--data d", {"--out": True}),
    "eval longbench": ("--data d", {"--out": True}),
    "eval needle": ("--data d", {"--out": True}),
    "eval perplexity": ("--data d", {"--out": True}),
    "eval reasoning": ("--data d", {"--out": True}),
    "eval recovery": ("--data d", {"--out": True}),
    "eval recovery-map": ("--data d", {"--out": True}),
    "eval ruler": ("--data d", {"--out": True}),
    "eval synthetic": ("--data d", {"--out": True}),
}


class TestOutputs:
    def test_every_command_that_writes_is_here(self):
        def paths(parser: argparse.ArgumentParser, name: str = ""):
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    for command, one in action.choices.items():
                        yield from paths(one, f"{name} {command}".strip())
                elif {"--out", "--plot"} & {*action.option_strings} and action.nargs != 0:
                    yield name, action.option_strings[0]

        found = set(paths(make_parser()))
        assert found == {(name, option) for name, (_, options) in WRITING.items() for option in options}

    @pytest.mark.parametrize("command", WRITING)
    def test_one_that_cannot_be_written_is_refused_before_work(self, capsys, tmp_path, monkeypatch, command):
        monkeypatch.setattr(cli, "_implementation", lambda module: pytest.fail("work was begun"))
        (tmp_path / "file.png").write_text("")
        (tmp_path / "folder.png").mkdir()
        needed, options = WRITING[command]
        for option, folder in options.items():
            reasons = {"file.png/new/a.png": "file.png is not a directory"}
            reasons |= {"file.png": "is not a directory"} if folder else {"folder.png": "it is a directory"}
            for name, reason in reasons.items():
                given = {other: str(tmp_path / f"{other}.png") for other in options} | {option: str(tmp_path / name)}
                line = fails(
                    capsys, *command.split(), *needed.split(), *(one for pair in given.items() for one in pair)
                )
                assert f"{option} {tmp_path / name}: can't be written: " in line
                assert line.endswith(reason)
        assert {one.name for one in tmp_path.iterdir()} == {"file.png", "folder.png"}

    def test_one_that_is_not_permitted(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(cli, "_implementation", lambda module: pytest.fail("work was begun"))
        monkeypatch.setattr(writing.os, "access", lambda path, mode: path != tmp_path)
        line = fails(capsys, "report", "run", "--out", tmp_path / "new")
        assert line.endswith(f"--out {tmp_path / 'new'}: can't be written: {tmp_path} can't be written to")

    @pytest.mark.parametrize("given", ["plant_tasks.py --data d", "explore_predictor.py --data d", "sweep_models.py"])
    def test_of_a_script(self, capsys, tmp_path, monkeypatch, given):
        script, *arguments = given.split()
        path = POCKET.parents[1] / "scripts" / script
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        assert stop.value.code == 2
        assert capsys.readouterr().err.endswith(f"--out {tmp_path}: can't be written: it is a directory\n")

    @pytest.mark.parametrize("given", ["compare_kvpress.py --model m --data d", "train_pocket_lm.py --corpus {}"])
    def test_of_a_script_that_fills_a_folder(self, capsys, tmp_path, monkeypatch, given):
        script, *arguments = given.format(tmp_path).split()
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--out", str(tmp_path / "file")])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(POCKET.parents[1] / "scripts" / script), run_name="__main__")
        assert stop.value.code == 2
        place = tmp_path / "file"
        assert capsys.readouterr().err.endswith(f"--out {place}: can't be written: {place} is not a directory\n")
