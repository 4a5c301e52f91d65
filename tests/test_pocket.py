"""The pocket model at 8K tokens: offloading is real, and prediction earns its place."""

from __future__ import annotations

from dataclasses import is_dataclass

import pytest
import torch
from conftest import POCKET

from attention_predictor import AttentionPredictor, OffloadConfig, attach
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.predictor.model import new_history
from attention_predictor.predictor.sketch import KeySketch

pytestmark = pytest.mark.usefixtures("all_cores")
TEXT = POCKET.parents[1] / "scripts" / "demo_text.txt"


def tensors(values: dict) -> list[torch.Tensor]:
    """Those among the values, in lists of them, and in the lists' dataclasses."""
    found = []
    for value in values.values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list):
            for part in value:
                found += tensors(vars(part) if is_dataclass(part) else {0: part})
    return found


@pytest.mark.slow
@torch.no_grad()
def test_the_device_holds_a_fifth_at_most(pocket):
    model, tokenizer = pocket
    prompt = torch.tensor([(tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"] * 2)[:8192]])
    with attach(model, OffloadConfig(budget=512)) as engine:
        cache = engine.new_cache()
        token = model(prompt, **with_cache(model, cache), logits_to_keep=1).logits.argmax(-1)
        for _ in range(32):
            token = model(token, **with_cache(model, cache)).logits.argmax(-1)
        cache.check_integrity()
    stats = engine.stats
    assert stats.full_kv_bytes == 8 * 2 * 2 * (8192 + 32) * 64 * 4
    # Measured on the tensors themselves, not taken from the figures they report.
    measured = 0
    for layer in cache.layers:
        held = [layer.blocks.pool.key_BGSTD, layer.blocks.pool.value_BGSTD, *layer.blocks.table.tensors]
        for part in layer.policy.parts.values():
            held += tensors(vars(part))
        measured += sum(one.untyped_storage().nbytes() for one in held)
    assert measured == pytest.approx(stats.device_kv_bytes, rel=0.01)
    assert measured <= stats.full_kv_bytes / 5
    assert set(stats.device_kv_parts()) == {"pool", "table", "sketch", "history"}


@pytest.mark.parametrize(("settings", "share"), [({"reserve": 0.5}, 0.2), ({}, 0.22)])
def test_a_fifth_holds_in_half_precision_with_half_the_reserve(settings, share):
    """There pool and cache halve, while codes, scales and the history's state stay as large as they are."""
    config = OffloadConfig(budget=512, **settings)
    shape = {"batch": 1, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
    sketch = KeySketch(**shape, device="cpu", bits=config.sketch_bits)
    sketch.extend(torch.randn(1, 2, 8192, 64).bfloat16(), torch.randn(1, 6, 64, 64).bfloat16())
    history = new_history(AttentionPredictor.from_pretrained("default"), batch=1, kv_heads=2, device="cpu")
    history.start(torch.rand(1, 2, 64, 512))
    pool = BlockPool(**shape, slots=Selection.of(config).max_slots, block_size=config.block_size, device="cpu")
    assert sketch.nbytes + history.nbytes + pool.nbytes <= share * 2 * 2 * 8192 * 64 * 2


@pytest.mark.slow
@torch.no_grad()
def test_generated_tokens_go_to_host_memory_too(tiny_model, ids):
    """1,200 tokens decoded behind a context of 8K, more than a slab; the pool stays as it is while the store grows."""
    model = tiny_model("llama", head_dim=64, num_hidden_layers=1, max_position_embeddings=12000)
    with attach(model, OffloadConfig(budget=512)) as engine:
        cache = engine.new_cache()
        token = model(ids(8192), **with_cache(model, cache), logits_to_keep=1).logits.argmax(-1)
        model(token, **with_cache(model, cache))
        pool_bytes = engine.stats.device_kv_parts()["pool"]
        produced = []
        for layer in cache.layers:
            update = layer.update

            def watched(key, value, *args, update=update, **kwargs):
                produced.append((key.clone(), value.clone()))
                return update(key, value, *args, **kwargs)

            layer.update = watched
        for step in range(1199):
            token = model(token, **with_cache(model, cache)).logits.argmax(-1)
            if step % 400 == 0:
                cache.check_integrity()
        for layer in cache.layers:
            del layer.update
        cache.check_integrity()
    for number, layer in enumerate(cache.layers):
        key, value = layer.blocks.store.read(8193, 9392)
        mine = produced[number :: len(cache.layers)]
        assert torch.equal(key, torch.cat([one for one, _ in mine], 2))
        assert torch.equal(value, torch.cat([one for _, one in mine], 2))
    stats = engine.stats
    assert stats.steps == 1200
    assert stats.device_kv_parts()["pool"] == pool_bytes
    assert stats.device_kv_bytes <= stats.full_kv_bytes / 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prediction_earns_its_place(earned_place):
    """10 answers a cell, with one to spare; test_gpu.py asks 100, with none."""
    earned_place(answers=10, device="cpu", spare=1, ahead=0.95)
