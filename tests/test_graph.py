"""Steps without the host: the same tokens as with the prefetch thread. Kernels are emulated here, captured on a GPU."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from emulated import emulate_steps
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from attention_predictor import OffloadConfig, attach
from attention_predictor.errors import ConfigError, HostMemoryError
from attention_predictor.offload.blocks import room as room_module
from attention_predictor.offload.blocks.host_memory import SPARE_BYTES
from attention_predictor.offload.hf import graph as graph_module
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policy_names import BUILT_IN
from attention_predictor.predictor.model import WindowPredictor

SETTINGS = {"budget": 96, "sink": 32, "recent": 32, "slab_blocks": 4}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device steps on the CPU, by the emulated GPU's kernels; all else as on a CPU."""
    emulate_steps(monkeypatch)


def decode(model, prompt: Tensor, steps: int, mask: Tensor | None = None, **settings: object) -> tuple[Tensor, object]:
    with attach(model, OffloadConfig(**SETTINGS | settings)) as engine:
        out = model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0
        )
        return out, engine.stats.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_same_tokens_and_fetches(emulated, tiny_model, ids, family: str) -> None:
    """Across the room's growth (128 tokens here), with blocks that open and groups of the sketch that fill."""
    model, prompt = tiny_model(family), ids(249)
    thread, by_host = decode(model, prompt, 13)
    graph, by_device = decode(model, prompt, 13, prefetch="graph")
    assert torch.equal(graph, thread)
    assert by_device["fallbacks"] == {}
    for name in ("steps", "ahead_bytes", "late_bytes", "hit_rate"):
        assert by_device[name] == pytest.approx(by_host[name], rel=0.05), name


BY_THE_HOST = {"full", "oracle"}  # they read every key at every step
EMA = {"predictor": "ema"}  # where the network makes no difference: emulated, it takes most of the time
VARIANTS = [
    *({"policy": name} for name in BUILT_IN if name not in BY_THE_HOST),
    *({"predictor": name} for name in ("last", "ema", "mean", "paper")),
    {"late_fetch": 0.0},
    {"late_fetch": 0.0, "reserve": 0.0} | EMA,
    {"late_fetch": 1.0} | EMA,
    {"calibration": "none"} | EMA,
    {"calibration": "none", "late_fetch": 0.0} | EMA,
    {"calibration": "exact", "late_fetch": 0.0, "calibration_interval": 3},
    {"calibration": "exact", "calibration_interval": 3} | EMA,
    {"measure_recovery": 3} | EMA,
    {"host_kv": "int8"} | EMA,
    {"host_kv": "int4", "measure_recovery": 3} | EMA,
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda given: "-".join(map(str, given.values())))
def test_every_policy_is_captured(emulated, tiny_model, ids, tmp_path, settings: dict) -> None:
    """The same tokens and fetches as with the prefetch thread, across the room's growth (128 tokens here).

    One of two sequences is padded.
    """
    model, prompt, steps = tiny_model("llama"), ids(249, batch=2), 12
    mask = torch.ones_like(prompt)
    mask[1, :37] = 0
    if settings.get("predictor") == "paper":
        torch.manual_seed(0)
        WindowPredictor().save(tmp_path)
        settings = {"predictor": str(tmp_path)}
    thread, by_host = decode(model, prompt, steps + 1, mask, **settings)
    graph, by_device = decode(model, prompt, steps + 1, mask, prefetch="graph", **settings)
    assert torch.equal(graph, thread)
    assert by_device["fallbacks"] == {}
    by_host_too = steps // 3 if {"calibration_interval", "measure_recovery"} & settings.keys() else 0
    assert by_device["captured_steps"] == steps - by_host_too
    for name in ("steps", "ahead_bytes", "late_bytes", "hit_rate", "streamed_bytes", "recovery"):
        assert by_device[name] == by_host[name] or by_device[name] == pytest.approx(by_host[name], rel=0.05), name


@pytest.mark.parametrize("policy", sorted(BY_THE_HOST))
def test_what_reads_every_key_says_so(emulated, tiny_model, ids, policy: str) -> None:
    model, prompt = tiny_model("llama"), ids(150)
    thread, _ = decode(model, prompt, 6, policy=policy)
    graph, stats = decode(model, prompt, 6, policy=policy, prefetch="graph")
    assert torch.equal(graph, thread)
    assert stats["captured_steps"] == 0
    assert f"policy {policy!r} reads every key at every step" in next(iter(stats["fallbacks"]))


@pytest.mark.slow
def test_budget_beyond_the_context_is_the_stock_model(emulated, tiny_model, ids) -> None:
    model, prompt = tiny_model("llama"), ids(100)
    stock = model.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0)
    assert torch.equal(decode(model, prompt, 12, prefetch="graph", budget=1024)[0], stock)


@pytest.mark.slow
def test_left_padding(emulated, tiny_model, ids) -> None:
    model, prompt = tiny_model("llama"), ids(200, batch=2)
    mask = torch.ones_like(prompt)
    mask[1, :37] = 0
    thread, _ = decode(model, prompt, 8, mask)
    graph, stats = decode(model, prompt, 8, mask, prefetch="graph")
    assert torch.equal(graph, thread)
    assert stats["fallbacks"] == {}


@pytest.mark.slow
def test_a_mask_that_changes_is_seen(emulated, tiny_model, ids) -> None:
    """By a step that is not captured, and says so; those behind it that keep the padding are captured again."""
    model, prompt = tiny_model("llama"), ids(200, batch=2)
    mask = torch.ones(2, 240, dtype=torch.int64)
    mask[1, :37] = 0
    outputs, captured = [], []
    for prefetch in ("none", "graph"):
        with attach(model, OffloadConfig(**SETTINGS, prefetch=prefetch)) as engine, torch.no_grad():
            cache = engine.new_cache()
            given = with_cache(model, cache)
            logits = [model(prompt, attention_mask=mask[:, :200], **given).logits[:, -1]]
            for step in range(14):
                seen = mask[:, : 201 + step].clone()
                if 5 <= step < 8:
                    seen[0, 60:90] = 0
                logits.append(model(prompt[:, step : step + 1], attention_mask=seen, **given).logits[:, -1])
                captured.append(engine.stats.captured_steps)
            outputs.append(torch.stack(logits))
            fallbacks = engine.stats.fallbacks
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-4, rtol=1e-3)
    ours = captured[14:]
    assert ours[4] == ours[7] > 2
    assert ours[13] == ours[7] + 6
    assert sum(fallbacks.values()) == 3
    (message,) = fallbacks
    assert "the attention mask does not hide exactly the prompt's left padding" in message


def test_a_step_without_the_mask_of_a_padded_prompt_is_not_captured(emulated, tiny_model, ids) -> None:
    model, prompt = tiny_model("llama"), ids(200, batch=2)
    mask = torch.ones_like(prompt)
    mask[1, :37] = 0
    with attach(model, OffloadConfig(**SETTINGS, prefetch="graph")) as engine, torch.no_grad():
        given = with_cache(model, engine.new_cache())
        model(prompt, attention_mask=mask, **given)
        model(prompt[:, :1], **given)
        assert engine.stats.captured_steps == 0
        assert engine.stats.fallbacks


@pytest.mark.parametrize(
    ("arguments", "odd"),
    [
        ({"output_hidden_states": False, "return_dict": True, "labels": None}, None),
        ({"output_attentions": False, "use_cache": True, "logits_to_keep": 1}, None),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"return_dict": False}, "return_dict"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
    ],
)
def test_arguments_that_ask_for_nothing_do_not_end_capture(emulated, tiny_model, ids, arguments, odd) -> None:
    model, prompt = tiny_model("llama"), ids(200)
    with attach(model, OffloadConfig(**SETTINGS, prefetch="graph")) as engine, torch.no_grad():
        given = with_cache(model, engine.new_cache())
        model(prompt, **given)
        for step in range(4):
            output = model(prompt[:, step : step + 1], **given, **arguments)
        assert engine.stats.captured_steps == (4 if odd is None else 0)
        reasons = [message.split(": ")[-1] for message in engine.stats.fallbacks]
        assert reasons == ([f"the call gives {odd}"] if odd else [])
        if arguments.get("output_hidden_states"):
            assert len(output.hidden_states) == 3


@pytest.mark.slow
def test_what_dies_is_free_without_garbage_collection(emulated, tiny_model, ids) -> None:
    """Cache, captured steps and output refer to each other; host memory must come back the moment the cache dies."""
    model, prompt = tiny_model("llama"), ids(200)
    gc.collect()
    gc.disable()
    try:
        with attach(model, OffloadConfig(**SETTINGS, prefetch="graph")) as engine, torch.no_grad():
            held = []
            for _ in range(3):
                cache = engine.new_cache()
                given = with_cache(model, cache)
                model(prompt, **given)
                for step in range(4):
                    output = model(prompt[:, step : step + 1], **given)
                alive = weakref.ref(cache)
                held.append(engine.runtime.memory.held_bytes)
                del cache, given, output
                assert alive() is None
                assert engine.runtime.memory.lent_bytes == 0
            assert len(set(held)) == 1
            engine.generate(prompt, max_new_tokens=5)
            model.generate(prompt, max_new_tokens=5)
            assert engine.runtime.memory.lent_bytes == 0
            assert engine.stats.captured_steps == 3 * 4 + 2 * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("memory_left", [True, False])
def test_memory_for_growth_is_prepared_before_it_is_needed(emulated, tiny_model, ids, monkeypatch, memory_left) -> None:
    """Room for 256 tokens, then (128 at a time here) 384. If none can be prepared, the step that needs it takes it."""
    monkeypatch.setattr(graph_module, "TOKENS_TO_PREPARE", 8)
    model, prompt = tiny_model("llama"), ids(240)
    with attach(model, OffloadConfig(**SETTINGS | EMA, prefetch="graph")) as engine, torch.no_grad():
        given, memory, held = with_cache(model, engine.new_cache()), engine.runtime.memory, []
        model(prompt, **given)
        if not memory_left:
            monkeypatch.setattr(room_module, "available_memory", lambda: SPARE_BYTES)
        for step in range(23):
            model(prompt[:, step : step + 1], **given)
            held.append(memory.held_bytes)
        assert engine.stats.captured_steps == 23
        assert not engine.stats.fallbacks
    before, prepared, after = held[6], held[8], held[-1]  # the room is used up at the 15th step
    assert before < prepared == after if memory_left else before == prepared < after


@pytest.mark.slow
@pytest.mark.parametrize("host_kv", ["auto", "int8", "int4"])
def test_the_host_takes_the_cache_back(emulated, tiny_model, ids, host_kv: str) -> None:
    """Steps, then a turn of several tokens, a crop, a copy, integrity checks; and steps again."""
    model, prompt = tiny_model("llama"), ids(230)
    outputs = []
    for prefetch in ("thread", "graph"):
        settings = SETTINGS | {"prefetch": prefetch, "host_kv": host_kv}
        with attach(model, OffloadConfig(**settings)) as engine, torch.no_grad():
            cache, logits = engine.new_cache(), []

            def step(cache, count: int, logits=logits) -> None:
                for token in range(count):
                    logits.append(model(prompt[:, token : token + 1], **with_cache(model, cache)).logits)

            model(prompt, **with_cache(model, cache))
            step(cache, 5)
            cache.check_integrity()
            step(cache, 4)
            twin = copy.deepcopy(cache)
            model(prompt[:, :9], **with_cache(model, cache))
            step(cache, 3)
            cache.crop(-6)
            step(cache, 3)
            step(twin, 3)
            for one in (cache, twin):
                one.check_integrity()
            assert cache.get_seq_length() == 230 + 5 + 4 + 9 + 3 - 6 + 3
        outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_the_limit_on_host_memory_holds(emulated, tiny_model, ids) -> None:
    """Steps reserve no memory beyond it: the host takes the last one that fits."""
    model, prompt = tiny_model("llama"), ids(193)
    limit = 2 * 2 * 2 * 8 * 4 * 192  # keys and values of two layers and heads, fp32: 192 tokens, whole slabs
    outputs = []
    for host_memory in (None, limit):
        with attach(model, OffloadConfig(**SETTINGS, prefetch="graph", host_memory=host_memory)) as engine:
            given = with_cache(model, engine.new_cache())
            outputs.append([model(prompt[:, :185], **given).logits[:, -1:]])
            outputs[-1] += [model(prompt[:, token : token + 1], **given).logits for token in range(185, 192)]
            if host_memory is not None:
                assert engine.stats.captured_steps == 6
                (message,) = engine.stats.fallbacks
                assert "captured steps: room for 1 × 256 tokens is 64.00 KiB of host memory: host_memory" in message
                assert engine.stats.host_kv_bytes == engine.runtime.memory.lent_bytes == limit
                with pytest.raises(HostMemoryError, match="1 × 193 tokens needs"):
                    model(prompt[:, 192:], **given)
    torch.testing.assert_close(torch.cat(outputs[1]), torch.cat(outputs[0]), atol=2e-4, rtol=1e-3)


def test_interrupted_steps_make_the_cache_unusable(emulated, tiny_model, ids, monkeypatch) -> None:
    model, prompt = tiny_model("llama"), ids(150)
    with attach(model, OffloadConfig(**SETTINGS, prefetch="graph")) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(prompt, **with_cache(model, cache))
        model(prompt[:, :1], **with_cache(model, cache))
        layer = cache.layers[1]
        monkeypatch.setattr(layer.policy, "observe", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model(prompt[:, :1], **with_cache(model, cache))
        monkeypatch.undo()
        with pytest.raises(Exception, match="did not reach the attention function"):
            model(prompt[:, :1], **with_cache(model, cache))


def test_what_cannot_be_captured_says_so_once(tiny_model, ids) -> None:
    model, prompt = tiny_model("llama"), ids(150)
    thread, _ = decode(model, prompt, 6)
    graph, stats = decode(model, prompt, 6, prefetch="graph")
    assert torch.equal(graph, thread)
    assert next(iter(stats["fallbacks"])).startswith("the prefetch thread in place of captured steps: they need a CUDA")


@pytest.mark.parametrize("calibration", ["exact", "none"])
def test_without_a_sketch_it_says_so(monkeypatch, tiny_model, ids, calibration: str) -> None:
    monkeypatch.setattr("attention_predictor.offload.hf.graph.binding.on_gpu", lambda device: True)
    _, stats = decode(
        tiny_model("llama"), ids(150), 4, prefetch="graph", calibration=calibration, late_fetch=0.0, kernels="none"
    )
    (reason,) = stats["fallbacks"]
    assert reason.endswith("they need the kernels")


def test_a_layer_that_keeps_a_stock_cache_is_named(tiny_model, ids) -> None:
    """One that nothing of fixed shape can stand in for; a window's is no such layer."""

    class OtherLayer(DynamicSlidingWindowLayer):
        pass

    model, prompt = tiny_model("gemma2"), ids(150)
    with attach(model, OffloadConfig(**SETTINGS, prefetch="graph")) as engine, torch.no_grad():
        cache = engine.new_cache()
        given = with_cache(model, cache)
        model(prompt, **given)
        assert graph_module.why_not_captured(cache, None).startswith("they need a CUDA device")
        cache.layers[0].__class__ = OtherLayer
        model(prompt[:, :1], **given)
        (reason,) = engine.stats.fallbacks
    assert "layer 0 keeps a OtherLayer of transformers" in reason


def test_detaching_gives_the_forward_back(tiny_model, ids) -> None:
    model = tiny_model("llama")
    before = dict(vars(model))
    engine = attach(model, OffloadConfig(**SETTINGS, prefetch="graph"))
    assert "forward" in vars(model)
    engine.detach()
    assert vars(model).keys() == before.keys()
    assert model.forward == type(model).forward.__get__(model)


class TestEngineGenerate:
    @pytest.mark.parametrize("prefetch", ["thread", "none"])
    def test_greedy_is_what_transformers_gives(self, tiny_model, ids, prefetch: str) -> None:
        model, prompt = tiny_model("llama"), ids(150)
        wanted, _ = decode(model, prompt, 10)
        with attach(model, OffloadConfig(**SETTINGS, prefetch=prefetch)) as engine:
            assert torch.equal(engine.generate(prompt, max_new_tokens=10, eos_token_id=[]), wanted)
        # Everything attended to: rounding may turn a selection, but no token.
        with attach(model, OffloadConfig(prefetch=prefetch)) as engine:
            whole, chunked = (
                engine.generate(prompt, max_new_tokens=10, eos_token_id=[], prefill_chunk_size=size)
                for size in (None, 64)
            )
        assert torch.equal(chunked, whole)

    def test_sequences_end(self, tiny_model, ids) -> None:
        model, prompt = tiny_model("llama"), ids(120, batch=2)
        mask = torch.ones_like(prompt)
        mask[1, :20] = 0
        with attach(model, OffloadConfig(**SETTINGS)) as engine:
            free = engine.generate(prompt, max_new_tokens=40, attention_mask=mask, eos_token_id=[])[:, 120:]
            end = int(free[0, 5])
            found = engine.generate(prompt, max_new_tokens=40, attention_mask=mask, eos_token_id=end, pad_token_id=0)
        for row, whole in zip(found[:, 120:], free, strict=True):
            length = next((i + 1 for i, token in enumerate(whole.tolist()) if token == end), 40)
            assert torch.equal(row[:length], whole[:length])
            assert not row[length:].any()

    def test_sampling(self, tiny_model, ids) -> None:
        model, prompt = tiny_model("llama"), ids(80)
        with attach(model, OffloadConfig(**SETTINGS)) as engine:
            one, same, other = (
                engine.generate(prompt, max_new_tokens=12, temperature=1.5, top_k=20, top_p=0.9, seed=seed)
                for seed in (1, 1, 2)
            )
            sure = engine.generate(prompt, max_new_tokens=12, temperature=1.5, top_k=1)
            greedy = engine.generate(prompt, max_new_tokens=12)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert torch.equal(sure, greedy)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed: expected at least 1"),
            (
                {"max_new_tokens": 1, "temperature": -1.0},
                "temperature=-1.0 is not allowed: expected 0, or 1e-06 or more",
            ),
            ({"max_new_tokens": 1, "top_p": 0.0}, "top_p=0.0 is not allowed"),
            ({"max_new_tokens": 1, "attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\], input_ids"),
        ],
    )
    def test_bad_arguments(self, tiny_model, ids, arguments: dict, message: str) -> None:
        with (
            attach(tiny_model("llama"), OffloadConfig(**SETTINGS)) as engine,
            pytest.raises(ConfigError, match=message),
        ):
            engine.generate(ids(40), **arguments)
