"""Models of other kinds than directories in half precision: GGUF files, quantised ones, damaged ones."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import write_texts
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from tiny_text_model import save_tiny_text_model
from transformers.integrations.gguf import kernels as gguf_kernels
from transformers.integrations.gguf.dequant import dequantize
from transformers.integrations.gguf.utils import replace_with_gguf_modules

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.loading import gguf_file, load_config, load_model, load_tokenizer

pytest.importorskip("gguf")
from tiny_gguf import BEGIN, CHAT, END, Type, make_byte_model, write_gguf  # needs the package

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


@pytest.fixture(scope="module")
def model() -> Any:
    return make_byte_model()


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as it is, beside another one."""
    path = write_gguf(tmp_path_factory.mktemp("models") / "whole.gguf", model, chat=CHAT)
    write_gguf(path.with_name("half.gguf"), model, Type.F16)
    return path


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(words…)``: the only line that a command says when it refuses something, without what it begins with."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        capsys.readouterr()  # what the test itself has caused
        assert main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "y").exists()
        return line.removeprefix(f"attnpred {words[0]}: ")

    return run


def next_tokens(model: Any, length: int = 300) -> list[int]:
    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    lengths = {"min_new_tokens": 16, "max_new_tokens": 16}
    done = model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, do_sample=False, pad_token_id=0)
    return done[0, length:].tolist()


class TestGgufFile:
    def test_model_and_tokenizer_are_those_that_were_written(self, model: Any, whole: Path) -> None:
        loaded, tokenizer = load_model(str(whole)), load_tokenizer(str(whole))
        assert loaded.dtype == torch.float32
        assert not loaded.training
        wanted = model.state_dict()
        for name, weight in loaded.state_dict().items():
            torch.testing.assert_close(weight, wanted[name])
        assert tokenizer.decode(tokenizer("the wörld")["input_ids"]) == "the wörld"
        assert len(tokenizer("them")["input_ids"]) == 2
        # What ends a text is asked of the model: of the tokenizer transformers 5.17 takes what begins one.
        assert (tokenizer.bos_token_id, loaded.generation_config.eos_token_id) == (BEGIN, END)
        assert tokenizer.chat_template == CHAT
        assert load_config(str(whole)).num_hidden_layers == 2

    @pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name)
    def test_types_of_numbers_and_blocks(self, kind: Type, model: Any, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", model, kind)
        loaded, wanted = load_model(str(path)), model.state_dict()
        coarse = {Type.F16: 1e-3, Type.BF16: 1e-2, Type.Q8_0: 1e-2}.get(kind, 0.15)
        for name, weight in loaded.state_dict().items():
            assert (weight - wanted[name]).abs().max() <= coarse * wanted[name].abs().max()
        file = gguf_file(str(path))
        assert file is not None
        assert file.dtype == {Type.F16: "float16"}.get(kind, "bfloat16")
        assert load_model(str(path), dtype="bfloat16").dtype == torch.bfloat16

    def test_a_log_file_gets_no_progress_bar(self, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
        load_model(str(whole))
        assert capfd.readouterr().err == ""

    def test_the_stock_models_tokens(self, whole: Path) -> None:
        """Contract 1 holds of a model out of a GGUF file."""
        loaded = load_model(str(whole))
        stock = next_tokens(loaded)
        with attach(loaded, OffloadConfig(budget=512)) as engine:
            assert next_tokens(loaded) == stock
            assert engine.stats.steps == 15

    @pytest.mark.parametrize("words", [("--model", "whole.gguf"), ("--model", ".", "--gguf-file", "whole.gguf")])
    def test_generate(
        self,
        words: tuple[str, ...],
        whole: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(whole.parent)
        assert main(["generate", *words, "--chat", "--prompt", "x" * 200, "--max-new-tokens", "4", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (len(result["tokens"]), result["prompt_tokens"]) == (4, len(f"<{'x' * 200}>A: "))

    def test_the_file_meant_is_taken(self, model: Any, whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
        """Not one of the same name in the working directory."""
        write_gguf(tmp_path / whole.name, make_byte_model(intermediate_size=96))
        monkeypatch.chdir(tmp_path)
        assert load_model(str(whole)).config.intermediate_size == model.config.intermediate_size

    def test_a_tokenizer_beside_a_file_that_has_none(self, model: Any, whole: Path, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", model, tokenizer=False)
        load_tokenizer(str(whole)).save_pretrained(tmp_path)
        assert load_tokenizer(str(path))("the")["input_ids"] == load_tokenizer(str(whole))("the")["input_ids"]

    def test_a_run_knows_its_file(self, model: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
        path = write_gguf(tmp_path / "m.gguf", model, Type.Q8_0)
        out, texts = tmp_path / "out", write_texts(tmp_path / "texts", sentences=40)
        command = ["eval", "perplexity", "--model", path, "--data", texts, "--context", 400, "--tail", 4, "--limit", 1]
        command += ["--budgets", 144, "--policies", "streaming", "--out", out]
        assert main([str(word) for word in command]) == 0
        settings = RunFolder.finished(out).description["settings"]
        assert settings["model"] == str(path)
        assert settings["gguf"].keys() == {"file", "bytes", "sha256"}
        assert settings["gguf"]["bytes"] == path.stat().st_size
        write_gguf(path, make_byte_model(rms_norm_eps=1e-5), Type.Q8_0)  # of the same size
        assert "settings.gguf.sha256 is '" in refused(*command)
        assert "settings.dtype is 'auto' there, asked for 'bfloat16'" in refused(*command, "--dtype", "bfloat16")


class TestBadGgufFiles:
    """One line, exit code 2."""

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_no_gguf_file(self, command: tuple[str, ...], tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "m.gguf").write_bytes(b"PK of another kind")
        line = refused(*command, "--model", "m.gguf")
        assert line == "'m.gguf' is not a GGUF file: it begins with b'PK o', not with b'GGUF'"

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_a_folder_of_files(self, command: tuple[str, ...], whole: Path, refused: Callable[..., str]) -> None:
        line = refused(*command, "--model", whole.parent)
        assert line == f"'{whole.parent}' holds GGUF models only: choose one with --gguf-file: half.gguf, whole.gguf"

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (("--gguf-file", "other.gguf"), "--gguf-file other.gguf is not in {0}, which holds half.gguf, whole.gguf"),
            (("--gguf-file", "whole"), "--gguf-file whole: expected a name that ends in .gguf"),
            (("--model", "no.gguf"), "'no.gguf' is neither a local file nor a hub name such as owner/name/file.gguf"),
            (("--model", "{0}/no.gguf"), "'{0}/no.gguf' is neither a local file nor "),
            (
                ("--model", "someone/model", "--gguf-file", "x.gguf"),
                "'someone/model/x.gguf' is not a local file, and the hub could not",
            ),
            (("--model", "{0}/whole.gguf", "--gguf-file", "x.gguf"), "--gguf-file x.gguf: --model {0}/whole.gguf is a"),
            (("--model", "someone/Model-GGUF"), "cannot load a tokenizer from 'someone/Model-GGUF'"),
        ],
    )
    def test_names(self, words: tuple[str, ...], line: str, whole: Path, refused: Callable[..., str]) -> None:
        folder = str(whole.parent)
        words = tuple(word.format(folder) for word in words)
        found = refused("generate", "--prompt", "x", "--model", folder, *words)
        assert found.startswith(line.format(folder))
        assert ("GGUF files are named by --gguf-file" in found) == ("Model-GGUF" in found)

    def test_a_shape_takes_no_file(self, refused: Callable[..., str]) -> None:
        assert refused("bench", "decode", "--shape", "tiny", "--gguf-file", "x.gguf").startswith("--gguf-file x.gguf: ")

    @pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.3, 0.9])
    def test_truncated(self, share: float, whole: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
        data = whole.read_bytes()
        (tmp_path / "m.gguf").write_bytes(data[: int(share * len(data))])
        line = refused("generate", "--prompt", "x", "--model", "m.gguf")
        assert line.startswith("'m.gguf' is cut short: ") or (
            share < 0.001 and line.startswith("'m.gguf' is not a GGUF")
        )

    @pytest.mark.parametrize(
        ("header", "line"),
        [
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is of GGUF version 1: 2 and 3 are supported"),
            (
                b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
                "is of GGUF version 50331648: 2 and 3 are supported, little-endian",
            ),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "names no architecture (general.architecture)"),
            (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "is damaged: its header holds a value of the"),
            (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 99, 1), "is damaged: its header holds a value"),
            (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4), "is damaged: its header holds a name that"),
            (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1 << 60, b"a", 4), "is cut short: its "),
        ],
    )
    def test_damaged(self, header: bytes, line: str, tmp_path: Path, refused: Callable[..., str]) -> None:
        (tmp_path / "m.gguf").write_bytes(header)
        assert refused("generate", "--prompt", "x", "--model", "m.gguf").startswith(f"'m.gguf' {line}")

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            ({"split.count": 3}, "'m.gguf' is one of 3 parts: join them by llama.cpp's `llama-gguf-split --merge`"),
            ({"general.alignment": 0}, "'m.gguf' is damaged: general.alignment is 0"),
        ],
    )
    def test_metadata(self, more: dict[str, int], line: str, model: Any, tmp_path: Path, refused: Any) -> None:
        write_gguf(tmp_path / "m.gguf", model, more=more)
        assert refused("generate", "--prompt", "x", "--model", "m.gguf").startswith(line)

    @pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[6]], ids=" ".join)
    def test_an_architecture_that_transformers_cannot_read(self, command, model, tmp_path, refused) -> None:
        write_gguf(tmp_path / "m.gguf", model, architecture="abacus")
        line = refused(*command, "--model", "m.gguf")
        assert line.endswith("GGUF model with architecture abacus is not supported yet.")
        assert line.startswith("cannot load a ")

    def test_no_tokenizer(self, model: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
        write_gguf(tmp_path / "m.gguf", model, tokenizer=False)
        line = refused("generate", "--prompt", "x", "--model", "m.gguf")
        assert line.startswith("'m.gguf' has no tokenizer, and its directory has none: expected one of tokenizer.json")

    @pytest.mark.parametrize("package", ["gguf", "accelerate"])
    def test_no_package(self, package: str, whole: Path, refused: Callable[..., str], monkeypatch: Any) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name))
        line = refused("generate", "--prompt", "x", "--model", whole)
        assert line.endswith(f"needs the package {package}: pip install 'attention-predictor[gguf]'")

    @pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
    def test_libraries_are_told_the_same(self, load: Callable[[str], Any], whole: Path) -> None:
        with pytest.raises(CheckpointError, match="holds GGUF models only"):
            load(str(whole.parent))
        with pytest.raises(CheckpointError, match="is neither a local file"):
            load("no.gguf")


class TestPackedWeights:
    @pytest.mark.parametrize("command", [COMMANDS[0], COMMANDS[6]], ids=" ".join)
    def test_an_architecture_whose_weights_cannot_stay_packed(self, command, whole, refused) -> None:
        line = refused(*command, "--model", whole, "--dtype", "packed")
        assert "can't keep packed weights of the architecture 'llama' (only of " in line

    def test_no_kernel(self, model: Any, tmp_path: Path, refused: Callable[..., str]) -> None:
        write_gguf(tmp_path / "m.gguf", model, Type.Q8_0, architecture="qwen35")
        line = refused("generate", "--prompt", "x", "--model", "m.gguf", "--device", "cpu", "--dtype", "packed")
        assert line.startswith("cannot load a tokenizer") or "no kernel for packed weights on cpu" in line
        with pytest.raises(ConfigError, match="no kernel for packed weights on cpu"):
            load_model(str(tmp_path / "m.gguf"), "cpu", "packed")

    def test_other_models(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        save_tiny_text_model(tmp_path / "model")
        line = refused("generate", "--prompt", "x", "--model", "model", "--dtype", "packed")
        assert line == "--dtype packed: --model model is not a GGUF file"
        with pytest.raises(ConfigError, match="is not a GGUF file"):
            load_model(str(tmp_path / "model"), dtype="packed")

    def test_what_is_pruned_is_saved(self, whole: Path, refused: Callable[..., str]) -> None:
        line = refused("prune", "--data", "x", "--layers", 1, "--out", "y", "--model", whole, "--dtype", "packed")
        assert line.startswith("--dtype packed: packed weights can't be saved")

    def test_attaching(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Linear layers that hold blocks: nothing asks them for a weight of numbers, and tokens are the stock model's.

        The kernel, which the hub has, is replaced by its definition: unpack and multiply.
        """
        import gguf

        class Kernel:
            def supports(self, kind: int) -> bool:
                return kind == Type.Q8_0

            def mul_mat_vec(self, blocks: Any, x: torch.Tensor, kind: int, rows: int) -> torch.Tensor:
                return x @ dequantize(blocks, kind, torch.float32).reshape(rows, -1).T

        model, kernel = make_byte_model(), Kernel()
        monkeypatch.setattr(gguf_kernels, "_gguf_kernel", kernel)
        linear = [name for name, one in model.named_modules() if type(one) is torch.nn.Linear]
        weights = {f"{name}.weight": model.get_submodule(name).weight for name in linear}
        packed = replace_with_gguf_modules(model, dict.fromkeys(weights, int(Type.Q8_0)), kernel, torch.float32)
        assert packed.keys() == weights.keys()
        for name, weight in weights.items():
            packed[name].weight.copy_(torch.from_numpy(gguf.quants.quantize(weight.detach().numpy(), Type.Q8_0)))
        stock = next_tokens(model)
        with attach(model, OffloadConfig(budget=512)) as engine:
            assert next_tokens(model) == stock
            assert engine.stats.steps == 15
        with attach(model, OffloadConfig(budget=160)):
            next_tokens(model)


class TestQuantisedDirectories:
    """By transformers' own means."""

    @pytest.fixture
    def eight_bit(self, tmp_path: Path) -> Path:
        """A checkpoint in 8-bit floating point, in one block a matrix."""
        make_tiny_model().save_pretrained(tmp_path / "fp8")
        weights, file = {}, tmp_path / "fp8" / "model.safetensors"
        for name, weight in load_file(file).items():
            if "proj" in name:
                scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
                weights |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
            else:
                weights[name] = weight
        save_file(weights, file, {"format": "pt"})
        quantised(tmp_path / "fp8", quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
        return tmp_path / "fp8"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may compute with these weights")
    def test_unpacked_weights_are_said_to_be(self, eight_bit: Path, caplog: pytest.LogCaptureFixture) -> None:
        loaded, wanted = load_model(str(eight_bit)), make_tiny_model().state_dict()
        assert "transformers unpacked its fp8 weights, because it can't compute with them here" in caplog.text
        for name, weight in loaded.state_dict().items():
            assert (weight - wanted[name]).abs().max() <= 0.07 * wanted[name].abs().max()

    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "requires bitsandbytes: `pip install"),
            ({"quant_method": "gptq", "bits": 4}, "requires "),
            ({"quant_method": "awq", "bits": 4}, "requires "),
            ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "cannot load a causal language model"),
            ({"quant_method": "abacus"}, "is quantised with 'abacus'; transformers supports "),
        ],
        ids=lambda given: given.get("quant_method") if isinstance(given, dict) else "",
    )
    def test_what_cannot_be_loaded_here(self, settings, line, tmp_path, refused) -> None:
        """Without the package that it takes, or by no package."""
        if importlib.util.find_spec(settings["quant_method"]) is not None:
            pytest.skip("the package is here")
        folder = save_tiny_text_model(tmp_path / "model")
        quantised(folder, **settings)
        assert line in refused("generate", "--prompt", "x", "--model", folder)


def quantised(folder: Path, **settings: Any) -> None:
    """Write into a checkpoint how its weights are quantised."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


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
