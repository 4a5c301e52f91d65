"""What tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, make_tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_predictor.eval.benchmarks.synthetic.benchmark import find_answers
from attention_predictor.eval.benchmarks.synthetic.documents import plant, read_texts
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.variants import Variant
from attention_predictor.loading import load_model, load_tokenizer

# Tiny tensors lose more by handing work to threads than they gain; tests of the pocket model take all cores.
CORES = torch.get_num_threads()
torch.set_num_threads(1)

POCKET = Path(__file__).resolve().parents[1] / "models" / "pocket-lm"


@pytest.fixture(scope="session")
def pocket() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pocket model in fp32 and its tokenizer."""
    return load_model(str(POCKET)), load_tokenizer(str(POCKET))


@pytest.fixture
def all_cores() -> Iterator[None]:
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, **changes)``: a random model in fp32, attention by the eager reference."""
    return make_tiny_model


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """``ids(length, batch=1, seed=0)``: random token ids."""

    def make(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, VOCABULARY - 1, (batch, length), generator=generator)

    return make


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the test run was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def exact_matmul() -> Iterator[None]:
    """fp32 products on a GPU are fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def earned_place(pocket: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[Callable[..., None]]:
    """Check that the predictor finds, at 8K tokens and a budget of 512, what full attention finds.

    Question and answer are both decoded behind the prefill. ``spare`` answers may be missing at each bound; ``ahead``
    is the share of full attention's answers that ahead-only prediction must find.
    """
    model, tokenizer = pocket

    def check(*, answers: int, device: str, spare: int, ahead: float, prefetch: str = "thread") -> None:
        texts = read_texts(POCKET.parents[1] / "scripts" / "demo_text.txt")
        samples = plant(
            tokenizer, texts, tasks=("kv", "facts"), documents=answers // 5, questions=5, context=8192, seed=0
        )
        model.to(device)

        def found(policy: str, **settings: object) -> int:
            right: list[bool] = []
            rule = Rule(policy, {"policy": policy, "prefetch": prefetch} | settings)
            with Variant.of(rule, 512).attached(model) as engine:
                for sample in samples:
                    right += find_answers(EvaluatedModel(model, engine), tokenizer, sample)["found"]
            assert len(right) == answers
            return sum(right)

        full = found("full")
        assert full >= 0.95 * answers - spare
        assert found("predictor", late_fetch=0.0) >= ahead * full - spare
        assert found("predictor") >= 0.98 * full - spare
        assert found("streaming") <= 0.1 * answers + spare
        assert found("predictor", late_fetch=0.0, calibration="none") <= 0.3 * answers + spare

    yield check
    model.to("cpu")


class Deprecated(logging.Handler):
    """What transformers logs of a deprecation is an error where it happens: the next version removes it."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # Assisted decoding in transformers calls ``generate`` so itself.
        if "deprecated" in message and not message.startswith("Passing `generation_config` together"):
            raise AssertionError(f"transformers: {message}")


def pytest_configure() -> None:
    logging.getLogger("transformers").addHandler(Deprecated())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
