"""Sequences of different lengths in one captured step: each gets the tokens that it gets alone."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from emulated import emulate_steps
from own_masks import give_mask
from torch import Tensor

from attention_predictor import AttachError, HostMemoryError, OffloadConfig, attach
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.places import Places, why_no_place
from attention_predictor.offload.hf.versions import with_cache

SETTINGS = {"budget": 96, "sink": 32, "recent": 32, "slab_blocks": 4, "prefetch": "graph"}
EMA = {"predictor": "ema"}  # where the network makes no difference: emulated, it takes most of the time
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, or the CPU with the GPU's kernels emulated."""
    if request.param == "cpu":
        emulate_steps(monkeypatch)
    return request.param


@torch.no_grad()
def prefilled(engine: Engine, prompt: Tensor) -> tuple[TieredCache, Tensor]:
    cache = engine.new_cache()
    logits = engine.model(prompt, **with_cache(engine.model, cache), logits_to_keep=1).logits
    return cache, logits[0, -1].argmax()


class Batch:
    """Greedy decoding of what has the places."""

    def __init__(self, engine: Engine, places: Places, count: int) -> None:
        self.engine, self.places = engine, places
        self.token_B1 = torch.zeros((count, 1), dtype=torch.int64, device=engine.device)
        self.found: dict[int, list[int]] = {}

    def put(self, place: int, prompt: Tensor) -> None:
        cache, token = prefilled(self.engine, prompt)
        self.places.put(place, cache)
        self.token_B1[place] = token
        self.found[place] = [int(token)]

    @torch.no_grad()
    def step(self) -> None:
        model, cache = self.engine.model, self.places.cache
        position_B1 = self.places.length_B[:, None].clone()
        logits_BV = model(self.token_B1, position_ids=position_B1, **with_cache(model, cache)).logits[:, -1]
        self.token_B1 = logits_BV.argmax(-1, keepdim=True)
        for place, tokens in self.found.items():
            tokens.append(int(self.token_B1[place]))


@pytest.mark.parametrize(
    "settings",
    [{}, EMA, {"late_fetch": 0.0} | EMA, {"host_kv": "int8"} | EMA]
    + [{"policy": name} for name in ("quest", "quest-ahead", "streaming", "h2o", "snapkv", "lazy-eviction")],
    ids=lambda given: "-".join(map(str, given.values())) or "default",
)
def test_each_sequence_gets_the_tokens_that_it_gets_alone(device, tiny_model, ids, settings: dict) -> None:
    model = tiny_model("llama").to(device)
    prompts = [ids(length, seed=length).to(device) for length in (130, 249, 180, 75)]
    steps = 9
    with attach(model, OffloadConfig(**SETTINGS | settings)) as engine:
        alone = [engine.generate(prompt, max_new_tokens=2 * steps + 1)[0, prompt.shape[1] :] for prompt in prompts]
        like, _ = prefilled(engine, prompts[0])
        assert why_no_place(like) is None
        batch = Batch(engine, Places(engine.captured, like, 3, 300), 3)
        batch.put(0, prompts[0])
        batch.put(2, prompts[1])  # place 1 stays free
        for _ in range(steps):
            batch.step()
        batch.put(1, prompts[2])
        first = batch.found.pop(0)
        batch.places.release(0)
        for _ in range(2):
            batch.step()
        batch.put(0, prompts[3])
        for _ in range(steps - 2):
            batch.step()
        assert first == alone[0][: steps + 1].tolist()
        assert batch.found[2] == alone[1][: 2 * steps + 1].tolist()
        assert batch.found[1] == alone[2][: steps + 1].tolist()
        assert batch.found[0] == alone[3][: steps - 1].tolist()
        assert engine.stats.fallbacks == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma3", {}),
        ("gpt-oss", EMA),
        ("ministral", EMA),
        ("llama4", EMA),
        ("gemma2", EMA),
        ("llama", {"skip_layers": (0,)} | EMA),
    ],
)
def test_layers_that_are_not_offloaded_share_the_step(device, tiny_model, ids, family: str, settings: dict) -> None:
    """Windows, chunks and whole contexts: longer and shorter than the prompts, which come and go."""
    # Else Llama 4's layers compute with the length, which is one for all (test_requests.py).
    changes = {"attn_temperature_tuning": False} if family == "llama4" else {}
    model = tiny_model(family, **changes).to(device)
    prompts = [ids(length, seed=length).to(device) for length in (130, 249, 75, 180)]
    by_host = OffloadConfig(**SETTINGS | settings | {"prefetch": "thread"})
    with attach(model, by_host) as engine:  # transformers' own layers, their own masks
        alone = [engine.generate(prompt, max_new_tokens=15)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    with attach(model, OffloadConfig(**SETTINGS | settings)) as engine:
        like, _ = prefilled(engine, prompts[1])
        assert why_no_place(like) is None
        batch = Batch(engine, Places(engine.captured, like, 3, 300), 3)
        batch.put(0, prompts[0])
        batch.put(2, prompts[1])
        for _ in range(6):
            batch.step()
        first = batch.found.pop(0)
        batch.places.release(0)
        batch.step()
        batch.put(0, prompts[2])  # shorter than the one before it
        batch.put(1, prompts[3])
        for _ in range(7):
            batch.step()
        assert first == alone[0][:7]
        assert batch.found[2] == alone[1][:15]
        assert batch.found[0] == alone[2][:8]
        assert batch.found[1] == alone[3][:8]
        assert engine.stats.fallbacks == {}


def test_a_place_returns_its_memory_and_refuses_what_is_too_long(device, tiny_model, ids) -> None:
    model = tiny_model("llama").to(device)
    with attach(model, OffloadConfig(**SETTINGS | EMA)) as engine:
        before = engine.runtime.memory.lent_bytes
        like, _ = prefilled(engine, ids(130).to(device))
        places = Places(engine.captured, like, 2, 200)
        with pytest.raises(HostMemoryError, match="room for 200 tokens, the sequence has 199"):
            places.put(0, prefilled(engine, ids(199).to(device))[0])
        del places, like
        engine.runtime.drain()  # of the last prompt, whose fetch would keep its memory
        gc.collect()
        assert engine.runtime.memory.lent_bytes == before


@pytest.mark.parametrize(("skipped", "kind"), [((), "dilated"), ((), "start"), ((1,), "dilated")])
def test_a_sequence_with_a_mask_of_its_own_gets_none(device, tiny_model, ids, skipped: tuple, kind: str) -> None:
    model = tiny_model("llama").to(device)
    with attach(model, OffloadConfig(**SETTINGS | EMA, skip_layers=skipped)) as engine:
        places = Places(engine.captured, prefilled(engine, ids(130).to(device))[0], 2, 300)
        give_mask(model, 1, kind)
        odd, _ = prefilled(engine, ids(100).to(device))
        for cache in (odd, copy.deepcopy(odd)):
            reason = "layer 1 has a mask that captured steps don't compute"  # on a GPU it is the capture's reason
            assert why_no_place(cache) in {reason, f"their steps are not captured: {reason}"}
            with pytest.raises(AttachError, match="layer 1 has a mask that captured steps don't compute"):
                places.put(0, cache)


@torch.no_grad()
def test_copies_and_places_keep_within_host_memory(device, tiny_model, ids) -> None:
    """The limit is of all caches together, whichever way they come."""
    model = tiny_model("llama").to(device)
    slab = 2 * 2 * 2 * 8 * 4 * 64  # keys and values of two layers and heads, fp32, 64 tokens
    with attach(model, OffloadConfig(**SETTINGS | EMA, host_memory=7 * slab)) as engine:
        lent = lambda: engine.runtime.memory.lent_bytes // slab  # noqa: E731
        like, _ = prefilled(engine, ids(130).to(device))  # three slabs
        places = Places(engine.captured, like, 2, 384)  # a spare one
        assert lent() == 4
        again = copy.deepcopy(like)  # shares two
        assert lent() == 5
        places.put(1, like, final_length=192)
        assert lent() == 5
        assert like.get_seq_length() == 0
        third = copy.deepcopy(again)
        assert lent() == 6
        with pytest.raises(HostMemoryError, match="host_memory allows"):
            places.put(0, again, final_length=320)  # two more
        again.check_integrity()
        assert lent() == 7  # what was lent before the error
        with pytest.raises(HostMemoryError, match="host_memory allows"):
            copy.deepcopy(again)
        with pytest.raises(HostMemoryError, match="host_memory allows"):
            Places(engine.captured, again, 2, 64)
        places.release(1)
        assert lent() == 6  # two that the copies share, one of each, the one above, a spare one
        for cache in (again, third):
            cache.check_integrity()
        del places, again, third, cache
        assert lent() == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"policy": "cake"}, "budgets differ by prompt, layer or head"),
        ({"policy": "pyramidkv"}, "budgets differ by prompt, layer or head"),
        ({"budget_allocation": [80, 112]} | EMA, "budgets differ by prompt, layer or head"),
        ({"measure_recovery": 3} | EMA, "some steps read all keys"),
    ],
)
def test_what_can_not_share_a_step_says_why(device, tiny_model, ids, settings: dict, reason: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2).to(device)
    with attach(model, OffloadConfig(**SETTINGS | settings)) as engine:
        cache, _ = prefilled(engine, ids(130).to(device))
        assert re.search(reason, why_no_place(cache) or "")
