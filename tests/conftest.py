"""What tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, make_tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
