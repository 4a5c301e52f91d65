"""A trained model that others publish, SmolLM2-135M-Instruct in GGUF: skipped where it was not fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.loading import gguf_file, load_model, load_tokenizer
from attention_predictor.offload.policy_names import BUILT_IN

pytest.importorskip("gguf")
pytestmark = [pytest.mark.real, pytest.mark.slow]

MODEL = Path(__file__).resolve().parents[1] / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).resolve().parents[1] / "scripts" / "demo_text.txt"
QUESTION = "What is the capital of France? Answer with its name alone."


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(str(MODEL)), load_tokenizer(str(MODEL))


@pytest.fixture(scope="module")
def prompt(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> torch.Tensor:
    """300 tokens of a book."""
    return loaded[1](TEXT.read_text("utf-8"), return_tensors="pt")["input_ids"][:, :300]


def following(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 8) -> list[int]:
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    done = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
    return done[0, ids.shape[1] :].tolist()


def test_unpacked(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = loaded
    file = gguf_file(str(MODEL))
    assert file is not None
    assert (file.architecture, file.has_tokenizer, file.dtype) == ("llama", True, "bfloat16")
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 30
    assert len(tokenizer) == model.config.vocab_size == 49152
    text = "Around the world in eighty days — costs £4,000.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packed(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers keeps no Llama packed, so that it is refused and not unpacked unasked."""
    words = ["--prompt", "x", "--model", str(MODEL.parent), "--gguf-file", MODEL.name, "--dtype", "packed"]
    assert main(["generate", *words]) == 2
    assert "can't keep packed weights of the architecture 'llama'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stock(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], prompt: torch.Tensor) -> list[int]:
    """What the stock model goes on with."""
    return following(loaded[0], prompt)


@pytest.mark.parametrize("policy", BUILT_IN)
def test_the_stock_models_tokens(policy: str, loaded, prompt, stock, all_cores: None) -> None:
    """Contract 1, of trained weights: a budget that holds everything changes nothing."""
    with attach(loaded[0], OffloadConfig(budget=512, policy=policy)) as engine:
        assert following(loaded[0], prompt) == stock
        assert engine.stats.steps == 7


def test_a_saved_one_is_the_same(loaded, prompt, stock, tmp_path: Path, all_cores: None) -> None:
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))(QUESTION)["input_ids"] == tokenizer(QUESTION)["input_ids"]
    assert following(load_model(str(tmp_path)), prompt) == stock


def test_it_answers_in_its_chat_template(capsys: pytest.CaptureFixture[str], all_cores: None) -> None:
    words = ["--chat", "--prompt", QUESTION, "--model", str(MODEL), "--device", "cpu", "--max-new-tokens", "12"]
    assert main(["generate", *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "Paris" in result["text"]
    assert result["prompt_tokens"] > 30  # the template brings a system's turn


def test_a_small_budget_leaves_sense(loaded, all_cores: None) -> None:
    """Question and answer are decoded under a budget of a fifth of what is before them."""
    model, tokenizer = loaded
    told = "The name of the hotel's cat is Bartholomew. "
    book = TEXT.read_text("utf-8")
    turn = {
        "role": "user",
        "content": f"{book[:2000]}\n{told}\n{book[2000:4500]}\nWhat is the name of the hotel's cat?",
    }
    text = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with attach(model, OffloadConfig(budget=256)) as engine:
        answer = tokenizer.decode(following(model, ids, tokens=16))
        assert engine.stats.hit_rate > 0
    assert "Bartholomew" in answer
