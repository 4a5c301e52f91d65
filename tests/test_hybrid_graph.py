"""Captured steps of models whose layers are not all tiered: windows, chunks, skipped layers, mixtures of experts."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from emulated import emulate_steps
from own_masks import give_mask
from recorded_steps import recorded_steps
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from attention_predictor import Engine, OffloadConfig, attach
from attention_predictor.offload.hf import graph as graph_module
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.fixed_layer import FixedLayer, why_not_fixed
from attention_predictor.offload.hf.graph import CacheGraph
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import with_cache

EXACT = {"budget": 320, "sink": 32, "recent": 32, "slab_blocks": 4, "prefetch": "graph"}
CASES = {
    "gemma2": {},
    "gemma3": {},
    "gpt-oss": {},
    "ministral": {},
    "qwen3-moe": {},
    "mixtral": {},
    "llama4": {},
    "llama": {"skip_layers": (0,)},
}
HYBRID = {name: settings for name, settings in CASES.items() if name not in ("qwen3-moe", "mixtral")}
families = pytest.mark.parametrize("family", CASES)
hybrid_families = pytest.mark.parametrize("family", HYBRID)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated steps, where stock layers can be stood in for."""

    emulate_steps(monkeypatch)
    of_the_policy = graph_module.why_not_captured

    def why_not_captured(cache: TieredCache, cache_graph: CacheGraph | None) -> str | None:
        for number, layer in enumerate(cache.layers):
            if not isinstance(layer, TieredLayer) and (reason := why_not_fixed(layer, number)) is not None:
                return reason
        return of_the_policy(cache, cache_graph)

    monkeypatch.setattr(graph_module, "why_not_captured", why_not_captured)


def forward(model, cache, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    position = None
    if mask is not None:
        position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
    return model(tokens, attention_mask=mask, position_ids=position, **with_cache(model, cache)).logits[:, -1]


def close(ours: list[Tensor], stock: list[Tensor]) -> None:
    for mine, its in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, its, atol=5e-4, rtol=1e-3)
        assert torch.equal(mine.argmax(-1), its.argmax(-1))


def sides(model: PreTrainedModel, family: str) -> Iterator[tuple[Engine | None, Cache]]:
    """The stock model with a cache of its own; then the same, attached, with one of the engine's."""
    yield None, DynamicCache(config=model.config)
    with attach(model, OffloadConfig(**EXACT | CASES[family])) as engine:
        yield engine, engine.new_cache()


@pytest.mark.slow
@torch.no_grad()
@families
def test_a_step_is_the_same_at_every_length(steps, tiny_model, ids, family: str) -> None:
    """Nothing asks the host, and nothing of the host's is frozen: the operations of all steps are one sequence."""
    model, prompt = tiny_model(family), ids(275)
    with attach(model, OffloadConfig(**EXACT | {"budget": 96} | CASES[family])) as engine, recorded_steps() as calls:
        cache = engine.new_cache()
        forward(model, cache, prompt[:, :260])
        for token in range(15):  # blocks open, groups of the sketch fill, windows turn
            forward(model, cache, prompt[:, 260 + token : 261 + token])
        assert engine.stats.captured_steps == 15
        assert engine.stats.fallbacks == {}
    assert len(calls) == 15
    assert len(calls[1]) > 50
    for later in calls[2:]:
        assert later == calls[1]


WINDOWS = {name: "attention_chunk_size" if name == "llama4" else "sliding_window" for name in HYBRID if name != "llama"}
STARTS = [
    *((family, length, {}) for family in CASES for length in (90, 245)),
    *((family, 90, {name: 97}) for family, name in WINDOWS.items()),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "length", "changes"), STARTS, ids=str)
def test_captured_steps_are_the_stock_model(steps, tiny_model, ids, family: str, length: int, changes: dict) -> None:
    """From before the window is full and across its turn; across the growth of the room (128 tokens here)."""
    model, prompt = tiny_model(family, **changes), ids(length + 14)
    outputs = []
    for engine, cache in sides(model, family):
        logits = [forward(model, cache, prompt[:, :length])]
        for token in range(length, length + 14):
            logits.append(forward(model, cache, prompt[:, token : token + 1]))
        outputs.append(logits)
        if engine is not None:
            assert engine.stats.fallbacks == {}
            assert engine.stats.captured_steps == 14
            cache.check_integrity()
    close(outputs[1], outputs[0])


@pytest.mark.slow
@torch.no_grad()
@families
def test_left_padding(steps, tiny_model, ids, family: str) -> None:
    model, prompt = tiny_model(family), ids(136, batch=2)
    mask = torch.ones_like(prompt)
    mask[1, :37] = 0
    outputs = []
    for engine, cache in sides(model, family):
        logits = [forward(model, cache, prompt[:, :120], mask[:, :120])]
        for token in range(120, 136):
            logits.append(forward(model, cache, prompt[:, token : token + 1], mask[:, : token + 1]))
        outputs.append(logits)
        if engine is not None:
            assert engine.stats.captured_steps == 16
    close(outputs[1], outputs[0])


@pytest.mark.slow
@torch.no_grad()
@hybrid_families
def test_the_host_gets_back_what_it_would_have(steps, tiny_model, ids, family: str) -> None:
    """Layer by layer the stock cache's tensors; then a copy, beams' reordering, a further turn, and steps again."""
    model, prompt = tiny_model(family), ids(200, batch=2)
    found = []
    for engine, cache in sides(model, family):
        logits = [forward(model, cache, prompt[:, :150])]

        def decode(cache, start: int, logits=logits) -> None:
            for token in range(start, start + 5):
                logits.append(forward(model, cache, prompt[:, token : token + 1]))

        decode(cache, 150)
        if engine is not None:
            assert engine.stats.captured_steps == 5
            assert any(isinstance(layer, FixedLayer) for layer in cache.layers)
            assert cache.get_seq_length() == 155
        twin = copy.deepcopy(cache)
        assert not any(isinstance(layer, FixedLayer) for one in (cache, twin) for layer in one.layers)
        stocks = [(layer.keys, layer.values, layer.get_seq_length()) for layer in cache.layers[:1]]
        decode(cache, 155)
        cache.reorder_cache(torch.tensor([1, 0]))
        decode(cache, 160)
        logits.append(forward(model, cache, prompt[:, 165:178]))
        decode(cache, 178)
        decode(twin, 155)
        if engine is not None:
            assert engine.stats.captured_steps == 25
            assert engine.stats.fallbacks == {}
            cache.check_integrity()
            twin.check_integrity()
        found.append((logits, stocks))
    close(found[1][0], found[0][0])
    for (key, value, length), (its_key, its_value, its_length) in zip(found[1][1], found[0][1], strict=True):
        assert length == its_length == 155
        torch.testing.assert_close(key, its_key, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(value, its_value, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("family", "length"), [("llama", 100), ("gemma3", 100)])
def test_crop_between_steps(steps, tiny_model, ids, family: str, length: int) -> None:
    """A full layer at any length, a window as long as it is not full."""
    model, prompt = tiny_model(family, **({"sliding_window": 200} if family == "gemma3" else {})), ids(length + 40)
    outputs = []
    for engine, cache in sides(model, family):
        logits = [forward(model, cache, prompt[:, :length])]
        for _ in range(2):
            start = int(cache.get_seq_length())
            for token in range(start, start + 6):
                logits.append(forward(model, cache, prompt[:, token : token + 1]))
            cache.crop(-3)
        outputs.append(logits)
        if engine is not None:
            assert engine.stats.captured_steps == 12
    close(outputs[1], outputs[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "llama"])
def test_beams(steps, tiny_model, ids, family: str) -> None:
    model, prompt = tiny_model(family), ids(100)
    form = {"num_beams": 3, "do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0}
    stock = model.generate(prompt, **form)
    with attach(model, OffloadConfig(**EXACT | CASES[family])):
        assert torch.equal(model.generate(prompt, **form), stock)


@torch.no_grad()
def test_what_assisted_decoding_asks_of_windows_goes_by_the_thread(steps, tiny_model, ids) -> None:
    model, prompt = tiny_model("gemma3"), ids(100)
    with attach(model, OffloadConfig(**EXACT)) as engine:
        cache = engine.new_cache()
        forward(model, cache, prompt[:, :90])
        forward(model, cache, prompt[:, 90:91])
        assert engine.stats.captured_steps == 1
        cache.activate_past_recording()
        forward(model, cache, prompt[:, 91:92])
        assert engine.stats.captured_steps == 1
        (message,) = engine.stats.fallbacks
        assert message.endswith("layer 0 records its past, as assisted decoding asks")


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "skipped", "captured"),
    [
        ("dilated", (0,), 0), ("window", (0,), 0), ("biased", (0,), 0), ("start", (0,), 0), ("prefix", (0,), 12),
        ("dilated", (), 0), ("window", (), 0), ("start", (), 0), ("prefix", (), 12),
    ],
)  # fmt: skip
def test_a_layer_with_a_mask_of_its_own(steps, tiny_model, ids, kind: str, skipped: tuple, captured: int) -> None:
    """Captured steps read no mask: they are taken only where the model's own mask says what they compute."""
    model, prompt = tiny_model("llama"), ids(112)
    number = 0 if skipped else 1
    give_mask(model, number, kind)

    def logits(cache: Cache) -> list[Tensor]:
        return [forward(model, cache, part) for part in prompt.split([100] + [1] * 12, dim=1)]

    stock = logits(DynamicCache(config=model.config))
    with attach(model, OffloadConfig(**EXACT, skip_layers=skipped)) as engine:
        close(logits(engine.new_cache()), stock)
        assert engine.stats.captured_steps == captured
        reasons = [line.partition("captured steps: ")[2] for line in engine.stats.fallbacks]
        assert reasons == [f"layer {number} has a mask that captured steps don't compute"] * (not captured)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [(0,), ()])
def test_a_copy_keeps_what_is_known_of_masks(steps, tiny_model, ids, skipped: tuple) -> None:
    model, prompt = tiny_model("llama"), ids(106)
    number = 0 if skipped else 1
    give_mask(model, number, "dilated")
    with attach(model, OffloadConfig(**EXACT, skip_layers=skipped)) as engine:
        cache = engine.new_cache()
        forward(model, cache, prompt[:, :100])
        copies = copy.deepcopy(cache), cache
        logits = [[forward(model, one, token) for token in prompt[:, 100:].split(1, dim=1)] for one in copies]
        close(*logits)
        assert engine.stats.captured_steps == 0
        (line,) = engine.stats.fallbacks
        assert line.endswith(f"layer {number} has a mask that captured steps don't compute")


def test_prompt_lookup(steps, tiny_model, ids) -> None:
    model, prompt = tiny_model("gemma3"), ids(100)
    form = {"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    stock = model.generate(prompt, **form)
    with attach(model, OffloadConfig(**EXACT)):
        assert torch.equal(model.generate(prompt, **form), stock)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["eager", "grouped_mm", "batched_mm"])
def test_the_setting_of_experts_is_restored(steps, tiny_model, ids, setting: str) -> None:
    model, prompt = tiny_model("qwen3-moe"), ids(120)
    model.set_experts_implementation(setting)
    stock = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    with attach(model, OffloadConfig(**EXACT)) as engine:
        ours = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
        assert engine.stats.captured_steps == 7
    assert torch.equal(ours, stock)
    assert model.config._experts_implementation == setting
