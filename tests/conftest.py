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

MODELS = Path(__file__).resolve().parents[1] / "models"
POCKET = MODELS / "pocket-lm"
SMOLLM2 = MODELS / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


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

    def newest(text: str, budget: int = 512, sink: int = 64) -> str:
        return str(tokenizer.decode(tokenizer(text)["input_ids"][sink - budget :]))

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
        # Streaming finds what stands where it reads, and guesses little more.
        near = sum(one.answer.strip() in newest(sample.document) for sample in samples for one in sample.questions)
        assert near <= 0.1 * answers
        assert found("streaming") <= near + 0.02 * answers + spare
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


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "every test that is not marked slow, with the first of its parameters alone (make test-fast)"
    parser.addoption("--fast", action="store_true", help=what)


def pytest_configure() -> None:
    logging.getLogger("transformers").addHandler(Deprecated())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        keep_fast(config, items)
    missing = {} if torch.cuda.is_available() else {"gpu": "no CUDA device"}
    if not SMOLLM2.exists():
        missing["real"] = f"no {SMOLLM2.relative_to(MODELS.parent)}: scripts/get_model.sh smollm2 fetches it"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def keep_fast(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What ``--fast`` selects: of each function one case, so that every area is still touched."""
    seen: set[str] = set()
    kept, left = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        slow = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        (left if slow or function in seen else kept).append(item)
        if not slow:
            seen.add(function)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
