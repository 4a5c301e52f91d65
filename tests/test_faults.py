"""Contract 5 and its neighbours: failures surface on the generating thread, at once; nothing hangs or goes stale."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time

import pytest
import torch
from transformers import DynamicCache

from attention_predictor import AttachError, FetchError, IntegrityError, OffloadConfig, attach
from attention_predictor.offload.hf.versions import with_cache

CONFIG = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16)
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def prefilled(tiny_model, ids):
    model = tiny_model()
    with torch.no_grad(), attach(model, CONFIG) as engine:
        cache = engine.new_cache()
        model(ids(200), **with_cache(model, cache))
        model(ids(1), **with_cache(model, cache))
        yield model, engine, cache, ids(1, seed=1)
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_a_failing_late_fetch_surfaces_in_its_step(prefilled, monkeypatch):
    model, _, cache, token = prefilled
    layer = cache.layers[1]
    with monkeypatch.context() as patch:
        # The blocks that the pool lacks are the ones that the current query is made to want.
        patch.setattr(
            layer.policy,
            "score_now",
            lambda step: (~layer.blocks.table.resident_RC).float().view(1, 2, -1) + 0.1,
        )
        # Only on this thread, where late fetches run: the worker may still be at work for the last token.
        patch.setattr(layer.blocks.pool, "write_blocks", _failing_on_this_thread(layer.blocks.pool.write_blocks))
        with pytest.raises(FetchError, match="the bus is on fire"):
            model(token, **with_cache(model, cache))
    # The fault is gone, but the cache stays unusable: its layers differ in length, and slots may be stale.
    with pytest.raises(AttachError, match="interrupted"):
        for _ in range(2):
            model(token, **with_cache(model, cache))


def _failing_on_this_thread(write_blocks):
    this = threading.current_thread()

    def fail(*args):
        if threading.current_thread() is this:
            raise OSError("the bus is on fire")
        write_blocks(*args)

    return fail


def test_a_failing_fetch_ahead_is_a_fetch_error(tiny_model, ids, monkeypatch):
    model = tiny_model()
    config = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, late_fetch=0.0, reserve=0.0)
    with torch.no_grad(), attach(model, config) as engine:
        cache = engine.new_cache()
        model(ids(200), **with_cache(model, cache))
        monkeypatch.setattr(cache.layers[0].blocks.table, "choose_ahead", _raise_value_error)
        with pytest.raises(FetchError) as caught:
            for _ in range(2):  # the next layer's submit notices, or this layer's next wait
                model(ids(1), **with_cache(model, cache))
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(FetchError):  # of another cache too: the worker is poisoned, and says so
            model(ids(200), **with_cache(model, engine.new_cache()))
            model(ids(1), **with_cache(model, cache))


def _raise_value_error(*args):
    raise ValueError("no choice")


def test_a_killed_thread_surfaces_within_one_step(prefilled):
    model, engine, cache, token = prefilled
    cache.check_integrity()  # which waits for what the worker still has to do
    worker = next(thread for thread in threading.enumerate() if "prefetch" in thread.name)
    killed = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
    assert killed == 1
    with contextlib.suppress(FetchError):  # the exception reaches the thread when it next runs Python
        engine.runtime.stages[0].prefetcher.submit(lambda: None)
    worker.join(10)
    assert not worker.is_alive()
    started = time.perf_counter()
    with pytest.raises(FetchError):
        model(token, **with_cache(model, cache))
    assert time.perf_counter() - started < 10
    engine.detach()  # does not hang either


@pytest.mark.usefixtures("interruptible")
def test_interrupt_in_the_middle_of_generation(tiny_model, ids):
    model = tiny_model()
    before = model.config._attn_implementation
    timer = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), attach(model, CONFIG):
        model.generate(ids(200), max_new_tokens=3000, do_sample=False)
    timer.join()
    assert model.config._attn_implementation == before
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]
    with attach(model, CONFIG):  # and works again
        assert model.generate(ids(200), max_new_tokens=3).shape[1] == 203


def test_an_interrupted_step_makes_its_cache_unusable(prefilled, monkeypatch):
    model, _, cache, token = prefilled
    layer = cache.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "attend", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(token, **with_cache(model, cache))
    with pytest.raises(AttachError, match="did not reach the attention function"):
        model(token, **with_cache(model, cache))
    with pytest.raises(AttachError, match="did not reach the attention function"):
        cache.crop(-1)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def interrupt_between_layers(model, inputs, cache):
    """A forward that ends in the first layer's MLP: behind that layer's attention, before the next one's."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model.layers[0].mlp, "forward", _interrupt)
        model(inputs, **with_cache(model, cache))


@torch.no_grad()
@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize(
    "config",
    # Policies whose tokens don't depend on the row of a step that was taken back.
    [OffloadConfig(predictor="ema"), OffloadConfig(policy="quest", budget=64, sink=16, recent=16)],
    ids=["budget beyond the context", "quest"],
)
def test_an_interrupt_between_layers_is_noticed_and_mended_by_crop(tiny_model, ids, config, adopted):
    model = tiny_model()

    def decode(disturb) -> list[int]:
        with attach(model, config) as engine:
            cache = DynamicCache() if adopted else engine.new_cache()
            token = model(ids(200), **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            tokens = [int(token)]
            for step in range(12):
                if step == 5:
                    disturb(token, cache)
                token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
                tokens.append(int(token))
            return tokens

    def interrupt(token, cache):
        interrupt_between_layers(model, token, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [206, 205]
        with pytest.raises(AttachError, match=r"from 205 to 206 tokens.* cache\.crop\(-1\), which leaves 205 in each"):
            model(token, **with_cache(model, cache))
        with pytest.raises(IntegrityError, match="from 205 to 206 tokens"):
            cache.check_integrity()
        cache.crop(205 - cache.get_seq_length())
        assert [layer.get_seq_length() for layer in cache.layers] == [205, 205]
        cache.check_integrity()

    assert decode(interrupt) == decode(lambda token, cache: None)


@torch.no_grad()
def test_an_interrupted_prefill_is_noticed_and_mended_by_crop(tiny_model, ids):
    model = tiny_model()
    with attach(model, CONFIG) as engine:
        cache = engine.new_cache()
        interrupt_between_layers(model, ids(200), cache)
        with pytest.raises(AttachError, match=r"from 0 to 200 tokens.* cache\.crop\(-200\)"):
            model(ids(1), **with_cache(model, cache))
        cache.crop(-200)
        out = model(ids(200), **with_cache(model, cache)).logits
        assert torch.equal(out, model(ids(200), **with_cache(model, engine.new_cache())).logits)


@torch.no_grad()
@pytest.mark.parametrize(("family", "skipped"), [("ministral", ()), ("llama", (0,))])
def test_an_interrupt_behind_a_stock_layer_is_noticed(tiny_model, ids, family, skipped):
    model = tiny_model(family)
    config = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, skip_layers=skipped)
    with attach(model, config) as engine:
        cache = engine.new_cache()
        model(ids(200), **with_cache(model, cache))
        interrupt_between_layers(model, ids(1), cache)
        with pytest.raises(AttachError, match="from 200 to 201 tokens"):
            model(ids(1), **with_cache(model, cache))


def test_a_model_that_bypasses_the_attention_function_is_caught(tiny_model, ids, monkeypatch):
    model = tiny_model()
    with torch.no_grad(), attach(model, CONFIG) as engine:
        cache = engine.new_cache()
        model(ids(80), **with_cache(model, cache))
        model.config._attn_implementation_internal = "sdpa"  # would quietly attend to the new token alone
        model(ids(1), **with_cache(model, cache))
        assert model.config._attn_implementation == "attention_predictor"  # each forward sets it
        monkeypatch.setattr(engine._attachment.turns, "_switch", lambda stock: None)
        model.config._attn_implementation_internal = "sdpa"
        with pytest.raises(AttachError, match="ignores the attention interface"):
            for _ in range(2):
                model(ids(1), **with_cache(model, cache))


@pytest.mark.slow
def test_two_models_in_two_threads(tiny_model, ids):
    models = [tiny_model("llama"), tiny_model("qwen3")]
    configs = [CONFIG, OffloadConfig(policy="quest", budget=64, sink=16, recent=16)]

    def run(model, config):
        with attach(model, config):
            return model.generate(ids(200), max_new_tokens=40, do_sample=False)

    alone = [run(*pair) for pair in zip(models, configs, strict=True)]
    together: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, run(models[i], configs[i]))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=50)
    assert all(torch.equal(together[i], alone[i]) for i in range(2))


def test_slow_fetches_change_nothing_but_the_wait(tiny_model, ids, monkeypatch):
    model = tiny_model()

    def run(delay: float) -> tuple[torch.Tensor, float]:
        with attach(model, CONFIG) as engine:
            cache = engine.new_cache()
            model(ids(200), **with_cache(model, cache))
            for layer in cache.layers:
                move = layer.blocks._move

                def late(extent, stall_ns_1, move=move):
                    time.sleep(delay)
                    return move(extent, stall_ns_1)

                monkeypatch.setattr(layer.blocks, "_move", late)
            out = [model(ids(1, seed=step), **with_cache(model, cache)).logits for step in range(8)]
            cache.check_integrity()
            return torch.cat(out), engine.stats.exposed_wait_ms

    with torch.no_grad():
        quick, _ = run(0.0)
        slow, wait_ms = run(0.02)
    assert torch.equal(quick, slow)
    assert wait_ms > 0
