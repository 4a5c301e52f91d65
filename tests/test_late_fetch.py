"""late_fetch="auto": what a step fetches late does not grow with the number of sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_predictor import OffloadConfig, attach
from attention_predictor.offload.config import LATE_FETCH, LATE_SEQUENCES
from attention_predictor.offload.stats import Stats

SMALL = {"budget": 160, "sink": 16, "recent": 16, "block_size": 4, "slab_blocks": 8, "predictor": "ema", "reserve": 0.0}


def decoded(model: torch.nn.Module, prompt: Tensor, **settings: object) -> tuple[Tensor, Stats]:
    with attach(model, OffloadConfig(**SMALL | settings)) as engine:  # type: ignore[arg-type]
        return engine.generate(prompt, max_new_tokens=24, eos_token_id=[]), engine.stats


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_auto_is_the_share_of_so_many_sequences(tiny_model, ids, batch: int) -> None:
    model, prompt = tiny_model(), ids(600, batch=batch)
    share = LATE_FETCH * min(1, LATE_SEQUENCES / batch)
    found, stats = decoded(model, prompt, late_fetch="auto")
    expected, _ = decoded(model, prompt, late_fetch=share)
    assert torch.equal(found, expected)
    rows, layers = batch * model.config.num_key_value_heads, model.config.num_hidden_layers
    most = stats.steps * layers * min(rows, LATE_SEQUENCES * model.config.num_key_value_heads) * LATE_FETCH * 40
    assert 0 < stats.late_bytes / (2 * 4 * 8 * 4) <= most  # keys and values, 4 tokens, 8 channels, fp32


def test_auto_fetches_ahead_alone_where_the_share_is_less_than_a_block(tiny_model, ids) -> None:
    model, prompt = tiny_model(), ids(200, batch=9)
    settings = {"budget": 48, "block_size": 8, "slab_blocks": 4}
    found, stats = decoded(model, prompt, late_fetch="auto", **settings)
    assert stats.late_bytes == 0
    assert torch.equal(found, decoded(model, prompt, late_fetch=0.01, **settings)[0])
