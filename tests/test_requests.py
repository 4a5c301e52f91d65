"""Requests side by side: the same tokens as one by one, one's fault is no other's, and all memory returns."""

from __future__ import annotations

import gc
import itertools
import random
import re

import numpy as np
import pytest
import torch
from emulated import emulate_steps
from own_masks import give_mask
from tiny_models import VOCABULARY

from attention_predictor import (
    ConfigError,
    ContextLengthError,
    HostMemoryError,
    LogitsError,
    OffloadConfig,
    Request,
    Sampling,
    attach,
)
from attention_predictor.offload.hf import fixed_layer, graph
from attention_predictor.offload.hf.graph import CacheGraph, CaptureError
from attention_predictor.offload.hf.places import PlacesGraph

SMALL = {"predictor": "ema", "sink": 16, "recent": 16, "block_size": 8, "slab_blocks": 2}
LENGTHS = (40, 7, 130, 85, 1, 64)
NO_END = VOCABULARY  # a token that is never chosen


def config(**changes) -> OffloadConfig:
    return OffloadConfig(**({"budget": 64} | SMALL | changes))


def prompts(ids, lengths=LENGTHS):
    return [ids(length, seed=seed)[0] for seed, length in enumerate(lengths)]


def collect(stream):
    """New tokens and ending of each request."""
    tokens, endings = {}, {}
    for request, token, ending in stream:
        assert request not in endings, "an event after the ending"
        tokens.setdefault(request, [])
        if token is not None:
            tokens[request].append(token)
        if ending is not None:
            endings[request] = ending
    return tokens, endings


def one_by_one(engine, request, chunk=None):
    prompt = torch.as_tensor(request.input_ids)
    options = {"eos_token_id": request.eos_token_id, "seed": request.seed, "prefill_chunk_size": chunk}
    sampling = {name: getattr(request.sampling, name) for name in ("temperature", "top_k", "top_p")}
    found = engine.generate(prompt[None], max_new_tokens=request.max_new_tokens, **options, **sampling)
    return found[0, len(prompt) :].tolist()


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("budget", [64, 1024])
@pytest.mark.parametrize(
    ("policy", "host_kv"),
    [
        ("predictor", "auto"),
        ("predictor", "int8"),
        ("quest", "int8"),
        *((name, "auto") for name in ("quest", "snapkv", "streaming", "h2o", "lazy-eviction", "cake", "full")),
    ],
)
def test_tokens_are_those_of_each_request_alone(tiny_model, ids, policy, host_kv, budget):
    with attach(tiny_model(), config(policy=policy, host_kv=host_kv, budget=budget)) as engine:
        requests = [
            Request(input_ids=prompt, max_new_tokens=4 + 5 * number, eos_token_id=NO_END)
            for number, prompt in enumerate(prompts(ids))
        ]
        expected = {request: one_by_one(engine, request) for request in requests}
        tokens, endings = collect(engine.stream(requests, places=3, prefill_chunk_size=None))
        assert tokens == expected
        for request, ending in endings.items():
            assert (ending.reason, ending.error) == ("length", None)
            assert ending.new_tokens == request.max_new_tokens
        assert engine.stats.requests == {"length": len(requests)}


def test_the_same_request_twice_is_refused(tiny_model, ids):
    with attach(tiny_model(), config()) as engine:
        request = Request(input_ids=ids(20)[0], max_new_tokens=3, eos_token_id=NO_END)
        stream = engine.stream([request, request])
        with pytest.raises(ConfigError, match="request 1 was in this stream before: its events would be mixed up"):
            collect(stream)
        assert len(collect(engine.stream([request]))[0][request]) == 3  # another stream takes it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "family"), [("predictor", "llama"), ("quest", "llama"), ("h2o", "llama"), ("streaming", "gemma3")]
)
def test_captured_steps_of_several_requests(monkeypatch, tiny_model, ids, policy, family):
    """They share steps; here kernels are emulated."""
    emulate_steps(monkeypatch)
    with attach(tiny_model(family), config(policy=policy, prefetch="graph")) as engine:
        requests = [
            Request(input_ids=prompt, max_new_tokens=5 + number, eos_token_id=NO_END)
            for number, prompt in enumerate(prompts(ids, (70, 130, 67, 90)))
        ]
        expected = {request: one_by_one(engine, request) for request in requests}
        before = engine.stats.captured_steps
        assert collect(engine.stream(requests, places=3, prefill_chunk_size=None))[0] == expected
        assert 0 < engine.stats.captured_steps - before < before  # steps are shared
        assert engine.runtime.memory.lent_bytes == 0


@pytest.mark.slow
def test_only_those_whose_masks_it_computes_share_a_captured_step(monkeypatch, tiny_model, ids):
    emulate_steps(monkeypatch)
    model = tiny_model()
    give_mask(model, 1, "long")
    with attach(model, config(prefetch="graph")) as engine:
        requests = [
            Request(input_ids=prompt, max_new_tokens=5 + number, eos_token_id=NO_END)
            for number, prompt in enumerate(prompts(ids, (70, 130, 67, 85)))
        ]
        expected = {request: one_by_one(engine, request) for request in requests}
        alone = engine.stats.captured_steps
        assert collect(engine.stream(requests, places=3, prefill_chunk_size=None))[0] == expected
        assert 0 < engine.stats.captured_steps - alone < alone  # steps are shared
        (line,) = engine.stats.fallbacks
        assert line.endswith("layer 1 has a mask that captured steps don't compute")


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 100}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama4", {"attn_scale": 2.0, "attn_temperature_tuning": False}, None),
        ("llama4", {"attn_scale": 2.0, "attn_temperature_tuning": True}, "computes with the cache's length"),
        ("llama", {"rope_parameters": LONG_ROPE}, "RoPE of type longrope"),
    ],
)
def test_what_depends_on_the_longest_sequence_shares_no_step(monkeypatch, tiny_model, ids, family, changes, reason):
    """Llama 4 scales queries by the cache's length, and Phi 3 chooses frequencies by the largest position."""
    emulate_steps(monkeypatch)
    if "rope_parameters" in changes:
        half = tiny_model(family).config.head_dim // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [2.0 ** (1 + n) for n in range(half)]}
        changes = {"rope_parameters": LONG_ROPE | factors}
    model = tiny_model(family, **changes)
    lone = ids(400), ids(40), ids(70)
    with attach(model, config(prefetch="graph", budget=1024)) as engine:
        requests = [Request(input_ids=prompt[0], max_new_tokens=8, eos_token_id=NO_END) for prompt in lone]
        found = collect(engine.stream(requests, places=3, prefill_chunk_size=None))[0]
        lines = [line for line in engine.stats.fallbacks if line.startswith("a step of its own for each request")]
        assert len(lines) == (reason is not None)
        assert all(reason in line for line in lines)
    for request, prompt in zip(requests, lone, strict=True):
        given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        stock = model.generate(prompt, max_new_tokens=8, do_sample=False, **given)
        assert found[request] == stock[0, prompt.shape[1] :].tolist()


def test_requests_of_a_model_whose_steps_are_not_captured_say_so(monkeypatch, tiny_model, ids):
    emulate_steps(monkeypatch)
    reason = "layer 0 keeps a LinearAttentionLayer of transformers, whose tensors move as it grows"
    monkeypatch.setattr(graph, "why_not_captured", lambda *_: reason)
    monkeypatch.setattr(fixed_layer, "WATCHED", {})  # no layer of transformers has a stand-in
    with attach(tiny_model(), config(prefetch="graph", skip_layers=(0,), policy="streaming")) as engine:
        requests = [Request(input_ids=prompt, max_new_tokens=3) for prompt in prompts(ids, (70, 90))]
        collect(engine.stream(requests, places=2, prefill_chunk_size=None))
        assert f"a step of its own for each request: their steps are not captured: {reason}" in engine.stats.fallbacks


def test_hybrid_models_and_sampling(tiny_model, ids):
    with attach(tiny_model("gemma3"), config()) as engine:
        requests = [
            Request(input_ids=prompt.tolist(), max_new_tokens=12, sampling=Sampling(temperature=0.9), seed=seed)
            for seed, prompt in enumerate(prompts(ids))
        ]
        expected = {request: one_by_one(engine, request) for request in requests}
        assert collect(engine.stream(requests, places=6, prefill_chunk_size=None))[0] == expected


def test_generate_takes_a_list_of_prompts(tiny_model, ids):
    with attach(tiny_model(), config()) as engine:
        given = prompts(ids)
        found = engine.generate([given[0].tolist(), *given[1:]], max_new_tokens=9)
        for prompt, both in zip(given, found, strict=True):
            alone = engine.generate(prompt[None], max_new_tokens=9)[0]
            assert torch.equal(both, alone)
        assert engine.generate([], max_new_tokens=3) == []
        with pytest.raises(ConfigError, match="a list of prompts has no padding"):
            engine.generate(given, max_new_tokens=3, attention_mask=torch.ones(6, 130))
        with pytest.raises(ConfigError, match=r"got \[1, 40\]"):
            engine.generate([given[0][None]], max_new_tokens=3)


def test_an_end_token_ends_one_request_and_is_its_last_token(tiny_model, ids):
    with attach(tiny_model(), config()) as engine:
        free = [Request(input_ids=p, max_new_tokens=20, eos_token_id=NO_END) for p in prompts(ids)]
        whole = [one_by_one(engine, request) for request in free]
        end = whole[2][6]
        requests = [Request(input_ids=p, max_new_tokens=20, eos_token_id=[end, NO_END]) for p in prompts(ids)]
        tokens, endings = collect(engine.stream(requests, places=4, prefill_chunk_size=None))
        for request, all_20 in zip(requests, whole, strict=True):
            stop = all_20.index(end) + 1 if end in all_20 else 20
            assert tokens[request] == all_20[:stop]
            assert endings[request].reason == ("eos" if end in all_20 else "length")
        assert "eos" in {ending.reason for ending in endings.values()}


def test_chunks_of_a_long_prompt_alternate_with_the_steps_of_others(tiny_model, ids):
    with attach(tiny_model(), config()) as engine:
        short = Request(input_ids=ids(20)[0], max_new_tokens=40, eos_token_id=NO_END)
        long = Request(input_ids=ids(320)[0], max_new_tokens=2, eos_token_id=NO_END)
        order = [event.request for event in engine.stream([short, long], prefill_chunk_size=32)]
        before = order[: order.index(long)]
        assert 9 <= len(before) <= 12  # ten chunks, a step of the short one beside each
        assert order.count(short) == 40


def test_requests_are_taken_as_late_as_possible_and_timed(tiny_model, ids):
    taken = []

    def source():
        for number in range(5):
            taken.append(number)
            yield Request(input_ids=ids(30)[0], max_new_tokens=6, eos_token_id=NO_END)

    with attach(tiny_model(), config()) as engine:
        stream = engine.stream(source(), places=2)
        assert taken == []
        next(stream)
        assert taken == [0, 1]
        _, endings = collect(stream)
        assert taken == [0, 1, 2, 3, 4]
        for ending in endings.values():
            assert ending.prompt_tokens == 30
            assert ending.first_token_s > 0
            assert ending.tokens_per_s > 0


def test_cancelled_before_during_and_after(tiny_model, ids, no_garbage_collection):
    with attach(tiny_model(), config()) as engine:
        new = lambda length: Request(input_ids=ids(length)[0], max_new_tokens=10, eos_token_id=NO_END, id=length)  # noqa: E731
        decoding, prefilling, waiting, other = new(8), new(160), new(9), new(50)
        expected = one_by_one(engine, other, 16)
        stream = engine.stream([decoding, prefilling, waiting, other], places=2, prefill_chunk_size=16)
        events = [next(stream) for _ in range(3)]
        assert {event.request for event in events} == {decoding}
        for request in (decoding, prefilling, waiting):
            stream.cancel(request)
        tokens, endings = collect(stream)
        assert [endings[one].reason for one in (decoding, prefilling, waiting, other)] == ["cancelled"] * 3 + ["length"]
        assert tokens[decoding] == tokens[prefilling] == tokens[waiting] == []
        assert tokens[other] == expected
        assert endings[prefilling].first_token_s is None
        stream.cancel(other)  # has ended
        assert list(stream) == []
        assert engine.stats.requests == {"cancelled": 3, "length": 1}
        assert any("request 160 cancelled after 0 tokens" in line for line in engine.stats.unfinished_requests)
        assert engine.runtime.memory.lent_bytes == 0


def test_a_request_of_nan_logits_fails_alone(tiny_model, ids):
    model = tiny_model()
    with attach(model, config()) as engine:
        requests = [Request(input_ids=p, max_new_tokens=12, eos_token_id=NO_END) for p in prompts(ids)]
        expected = {request: one_by_one(engine, request) for request in requests}
        poison = expected[requests[3]][4]  # the weights of a token's embedding: NaN once the request reads it
        with torch.no_grad():
            model.get_input_embeddings().weight[poison] = torch.nan
        tokens, endings = collect(engine.stream(requests, places=3, prefill_chunk_size=None))
        failed = [request for request in requests if endings[request].reason == "failed"]
        assert requests[3] in failed
        assert len(failed) < len(requests)
        for request in requests:
            if request in failed:
                assert isinstance(endings[request].error, LogitsError)
                n = len(tokens[request])
                assert tokens[request] == expected[request][:n]
            else:
                assert tokens[request] == expected[request]
        assert engine.stats.requests["failed"] == len(failed)


class TestMemory:
    def bytes_of(self, engine, tokens):
        return engine.runtime.room.bytes_for(1, tokens)

    def test_a_request_waits_for_memory_and_one_that_never_fits_is_refused(self, tiny_model, ids):
        model = tiny_model()
        with attach(model, config()) as engine:
            limit = self.bytes_of(engine, 176)
        with attach(model, config(host_memory=limit)) as engine:
            requests = [Request(input_ids=ids(n)[0], max_new_tokens=20) for n in (60, 180, 62, 200, 61)]
            living, most = set(), 0
            endings = {}
            for request, _, ending in engine.stream(requests, places=4, prefill_chunk_size=16):
                living.add(request)
                most = max(most, len(living))
                assert engine.runtime.memory.lent_bytes <= limit
                if ending is not None:
                    living.remove(request)
                    endings[request] = ending
            assert [endings[request].reason for request in requests] == [
                "length",
                "failed",
                "length",
                "failed",
                "length",
            ]
            assert isinstance(endings[requests[1]].error, HostMemoryError)
            assert most == 2
            assert sum("host_memory allows" in line for line in engine.stats.unfinished_requests) == 2
            assert engine.runtime.memory.lent_bytes == 0
            with pytest.raises(HostMemoryError, match="host_memory allows"):
                engine.generate([ids(20)[0], ids(200)[0]], max_new_tokens=2)

    @pytest.mark.slow
    @pytest.mark.parametrize("more", [0, 16])
    def test_captured_steps_reserve_nothing_that_others_were_promised(self, monkeypatch, tiny_model, ids, more):
        """The first one's steps would take a slab more than it needs just before the other's prompt needs that."""
        emulate_steps(monkeypatch)
        model = tiny_model()
        with attach(model, config()) as engine:
            needed = sum(self.bytes_of(engine, tokens) for tokens in (96, 112))
            limit = needed + self.bytes_of(engine, more)
        with attach(model, config(prefetch="graph", host_memory=limit)) as engine:
            lengths = {94: 3, 108: 5}
            requests = [
                Request(input_ids=ids(n)[0], max_new_tokens=new, eos_token_id=NO_END) for n, new in lengths.items()
            ]
            expected = {request: one_by_one(engine, request) for request in requests}
            tokens, endings = collect(engine.stream(requests, places=2))
            assert [ending.reason for ending in endings.values()] == ["length"] * 2
            assert tokens == expected
            assert engine.runtime.memory.lent_bytes == 0

    @pytest.mark.parametrize("error", [HostMemoryError, torch.OutOfMemoryError])
    @pytest.mark.parametrize("when", ["prefill", "decoding"])
    def test_out_of_memory_ends_one_request(self, tiny_model, ids, monkeypatch, no_garbage_collection, error, when):
        model = tiny_model()
        with attach(model, config()) as engine:
            requests = [Request(input_ids=p, max_new_tokens=12, eos_token_id=NO_END) for p in prompts(ids)]
            expected = {request: one_by_one(engine, request, 16) for request in requests}
            own, forwards = model.model.layers[1].mlp.forward, itertools.count()

            def failing(hidden):
                if hidden.shape[1] == (16 if when == "prefill" else 1) and next(forwards) == 11:
                    raise error("no memory left")
                return own(hidden)

            monkeypatch.setattr(model.model.layers[1].mlp, "forward", failing)
            tokens, endings = collect(engine.stream(requests, places=3, prefill_chunk_size=16))
            failed = [request for request in requests if endings[request].reason == "failed"]
            assert len(failed) == 1
            assert isinstance(endings[failed[0]].error, error)
            for request in requests:
                assert tokens[request] == expected[request][: len(tokens[request])]
                assert request in failed or len(tokens[request]) == 12
            assert engine.stats.requests == {"failed": 1, "length": len(requests) - 1}
            assert "no memory left" in engine.stats.unfinished_requests[0]
            assert engine.runtime.memory.lent_bytes == 0

    def test_closing_or_dropping_a_stream_frees_its_memory(self, tiny_model, ids, no_garbage_collection):
        with attach(tiny_model(), config()) as engine:
            for close in (True, False):
                stream = engine.stream([Request(input_ids=p, max_new_tokens=12) for p in prompts(ids)])
                next(stream)
                assert engine.runtime.memory.lent_bytes > 0
                if close:
                    stream.close()
                    assert list(stream) == []
                    stream.close()
                else:
                    del stream
                    engine.runtime.drain()
                assert engine.runtime.memory.lent_bytes == 0

    @pytest.mark.parametrize("host_kv", ["auto", "int8"])
    @pytest.mark.parametrize("seed", range(3))
    def test_random_arrivals_endings_and_cancellations(self, tiny_model, ids, no_garbage_collection, seed, host_kv):
        draw = random.Random(seed)
        with attach(tiny_model(), config(host_kv=host_kv)) as engine:
            requests = [
                Request(input_ids=ids(draw.randint(1, 150), seed=n)[0], max_new_tokens=draw.randint(1, 20), id=n)
                for n in range(16)
            ]
            expected = {request: one_by_one(engine, request) for request in requests}
            stream = engine.stream(requests, places=draw.randint(1, 5), prefill_chunk_size=None)
            tokens, cancelled, endings = {request: [] for request in requests}, set(), {}
            for request, token, ending in stream:
                tokens[request] += [token] if token is not None else []
                if ending is not None:
                    endings[request] = ending.reason
                if draw.random() < 0.05:
                    victim = draw.choice(requests)
                    if victim not in endings:
                        cancelled.add(victim)
                        stream.cancel(victim)
                for cache in [one._cache for one in stream._running if one.prefilled]:
                    cache.check_integrity()
                    del cache
                engine.runtime.memory.check_integrity()
            assert set(endings) == set(requests)
            for request in requests:
                if endings[request] == "cancelled":
                    assert request in cancelled
                    assert tokens[request] == expected[request][: len(tokens[request])]
                else:
                    assert tokens[request] == expected[request]
            assert engine.runtime.memory.lent_bytes == 0
            assert sum(engine.stats.requests.values()) == len(requests)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": []}, "at least one token"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, r"got \[1, 2\]"),
        ({"input_ids": "text"}, "got 'text'"),
        ({"input_ids": [1], "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"input_ids": [[1, 2], [3, 4]]}, "at least one token"),
        ({"input_ids": [0.5, 1.0]}, "must be whole numbers, got torch.float32"),
        ({"input_ids": ["a"]}, "at least one token"),
        ({"input_ids": [2**70]}, "at least one token"),
        ({"input_ids": None}, "at least one token"),
        (
            {"input_ids": torch.ones(2, dtype=torch.int64).to_sparse()},
            "must be a dense tensor with values, got torch.sparse_coo",
        ),
        ({"input_ids": [1], "sampling": None}, "sampling=None is not allowed: expected an object of Sampling"),
        ({"input_ids": [1], "prefix": 5}, "prefix=5 is not allowed"),
        ({"input_ids": [1], "seed": "a"}, "seed='a'"),
        ({"input_ids": [1], "eos_token_id": 1.5}, "eos_token_id=1.5"),
    ],
)
def test_a_bad_request_is_refused_when_it_is_made(given, message):
    with pytest.raises(ConfigError, match=message):
        Request(**({"max_new_tokens": 1} | given))


def test_a_divided_model_is_refused(tiny_model, monkeypatch):
    with attach(tiny_model(), config()) as engine:
        monkeypatch.setattr(engine.runtime.ranks, "count", 2)
        with pytest.raises(ConfigError, match="divided among 2 processes"):
            engine.stream([])


def test_an_error_that_is_no_request_s_own_ends_the_stream(tiny_model, ids, monkeypatch):
    model = tiny_model()
    with attach(model, config()) as engine:
        stream = engine.stream([Request(input_ids=ids(30)[0], max_new_tokens=9)])
        next(stream)
        monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)
        assert list(stream) == []


def test_a_request_that_the_model_cant_read_fails_alone(tiny_model, ids):
    with attach(tiny_model(), config()) as engine:
        positions = engine.runtime.text_config.max_position_embeddings
        good = Request(input_ids=ids(9)[0], max_new_tokens=3)
        bad = [
            Request(input_ids=[1, -1], max_new_tokens=3),
            Request(input_ids=[1, engine.runtime.text_config.vocab_size], max_new_tokens=3),
            Request(input_ids=[1], max_new_tokens=positions + 1),
        ]
        _, endings = collect(engine.stream([*bad, good]))
        assert endings[good].reason in ("eos", "length")
        kinds = [type(endings[request].error) for request in bad]
        assert kinds == [ConfigError, ConfigError, ContextLengthError]
        for name in ("places", "prefill_chunk_size"):
            with pytest.raises(ConfigError, match=f"{name}=0 is not allowed"):
                engine.stream([good], **{name: 0})
        for wrong, kind in (([[1, 2]], "list"), ([None, good], "NoneType")):
            with pytest.raises(ConfigError, match=f"stream takes objects of Request, got {kind}"):
                next(engine.stream(wrong))
        with pytest.raises(ConfigError, match="stream takes several requests, such as a list, got Request"):
            engine.stream(good)


@pytest.mark.parametrize(
    "kind", [int, lambda token: [token], torch.tensor, lambda token: torch.tensor([token]), np.int64]
)
def test_end_tokens_of_any_kind_of_integer(tiny_model, ids, kind):
    with attach(tiny_model(), config()) as engine:
        prompt = ids(20)
        free = engine.generate(prompt, max_new_tokens=6, eos_token_id=NO_END)[0, 20:].tolist()
        for given in (prompt, [prompt[0]]):
            found = engine.generate(given, max_new_tokens=6, eos_token_id=kind(free[2]))[0].flatten()[20:].tolist()
            assert found == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not allowed: expected an integer, at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"prefill_chunk_size": "a"}, "prefill_chunk_size='a'"),
        ({"temperature": None}, "temperature=None is not allowed: expected 0, or 1e-06 or more"),
        ({"temperature": 1e-45}, "temperature=1e-45"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"seed": 2**80}, "seed=1208925819614629174706176 is not allowed: expected an integer of 64 bits, or None"),
        ({"eos_token_id": "a"}, "eos_token_id='a' is not allowed: expected a token id, several, or None"),
        ({"eos_token_id": [3, 2**63]}, "eos_token_id=[3, 9223372036854775808] is not allowed"),
        ({"temperature": 10**400}, "is not allowed: expected 0, or 1e-06 or more"),
    ],
)
def test_what_generate_is_given_is_checked_before_a_forward(tiny_model, ids, monkeypatch, given, message):
    model = tiny_model()
    with attach(model, config()) as engine:
        monkeypatch.setattr(model, "forward", None)
        for prompts in (ids(9), [ids(9)[0]]):
            with pytest.raises(ConfigError, match=re.escape(message)):
                engine.generate(prompts, **{"max_new_tokens": 3} | given)
        for wrong, reason in (
            (ids(9).float(), "input_ids must be whole numbers, got torch.float32"),
            (ids(9) - 200, "the model has tokens from 0 to"),
            (ids(9)[:0], "input_ids must be [batch, tokens] with at least one token, got [0, 9]"),
            ([ids(9)[0], [1, 10**6]], "token 1000000 in input_ids"),
            (5, "input_ids must be a tensor or a list of prompts, got int"),
            (ids(9).to("meta"), "input_ids must be a dense tensor with values, got a meta tensor"),
            ([ids(9)[0].to("meta")], "input_ids of a request must be a dense tensor with values, got a meta tensor"),
        ):
            with pytest.raises(ConfigError, match=re.escape(reason)):
                engine.generate(wrong, max_new_tokens=3)
        for padding in ("a", [1], 1.5, VOCABULARY, -1, 10**30):
            with pytest.raises(ConfigError, match=r"is not allowed: expected .*0 to 96, or None"):
                engine.generate(ids(9), max_new_tokens=3, pad_token_id=padding)
        ones = torch.ones(1, 9)
        for mask, reason in (
            (ones.to_sparse(), "attention_mask must be a dense tensor with values, got torch.sparse_coo"),
            (2 * ones, "attention_mask must be 1 for each token and 0 for each of padding"),
            (-ones, "attention_mask must be 1 for each token and 0 for each of padding"),
            (0.5 * ones, "attention_mask must be 1 for each token and 0 for each of padding"),
            (torch.nan * ones, "attention_mask must be 1 for each token and 0 for each of padding"),
        ):
            with pytest.raises(ConfigError, match=re.escape(reason)):
                engine.generate(ids(9), max_new_tokens=3, attention_mask=mask)
        for size in ({"batch": "a"}, {"batch": 0}, {"tokens": None}, {"tokens": -5}, {"batch": 1.5}):
            with pytest.raises(ConfigError, match="is not allowed: expected"):
                engine.check_fits(**{"batch": 1, "tokens": 5} | size)
        with pytest.raises(ConfigError, match="cancel takes an object of Request, got int"):
            engine.stream([]).cancel(5)


def test_tokens_and_sizes_of_other_types(tiny_model, ids):
    with attach(tiny_model(), config()) as engine:
        prompt = ids(40, batch=2)
        first = engine.generate(prompt, max_new_tokens=1, eos_token_id=NO_END)[0, -1].item()
        expected = engine.generate(prompt, max_new_tokens=6, eos_token_id=[first], pad_token_id=3)
        assert (expected[0, 41:] == 3).all()
        for three in (np.int64(3), torch.tensor(3)):
            for ends in (iter([first]), np.array([first]), torch.tensor([first]), np.int64(first)):
                found = engine.generate(prompt, max_new_tokens=np.int64(6), eos_token_id=ends, pad_token_id=three)
                assert torch.equal(found, expected)
            engine.check_fits(batch=three, tokens=three)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16, torch.bfloat16])
def test_masks_of_any_type(tiny_model, dtype):
    """Positions are whole numbers, which bf16 counts up to 256 only."""
    model = tiny_model("qwen2")
    prompt = torch.randint(2, 96, (1, 310), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    with attach(model, config(budget=512)) as engine:
        expected = engine.generate(prompt, attention_mask=mask, max_new_tokens=24, eos_token_id=NO_END)
        found = engine.generate(prompt, attention_mask=mask.to(dtype), max_new_tokens=24, eos_token_id=NO_END)
    assert torch.equal(found, expected)


def test_the_caller_may_use_the_memory_of_a_prompt_again(tiny_model, ids):
    texts = [ids(20, seed=seed)[0] for seed in range(3)]
    given = {"max_new_tokens": 5, "eos_token_id": NO_END}
    with attach(tiny_model(), config()) as engine:
        expected = engine.generate(texts, **given)
        buffer, values, array = torch.empty(20, dtype=torch.int64), [], np.empty(20, dtype=np.int64)

        def in_a_list():
            for text in texts:
                values[:] = text.tolist()
                yield values

        def in_an_array():
            for text in texts:
                array[:] = text
                yield array

        for reused in ((buffer.copy_(text) for text in texts), in_a_list(), in_an_array()):
            found = engine.generate(reused, **given)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        prefix = engine.prefill(buffer.copy_(texts[0]))
        buffer.zero_()
        assert torch.equal(prefix.ids_T, texts[0])


@pytest.mark.parametrize("again", ["generate", "model", "stream"])
def test_the_memory_of_the_generation_before_is_free(tiny_model, ids, again):
    """A fetch that is still in progress when it ends keeps it no longer than it takes."""
    model = tiny_model()
    with attach(model, config(host_memory=60_000)) as engine:
        for _ in range(20):
            if again == "generate":
                engine.generate(ids(130), max_new_tokens=60, eos_token_id=NO_END)
                continue
            model.generate(ids(130), max_new_tokens=59, do_sample=False, pad_token_id=0)
            if again == "stream":
                request = Request(input_ids=ids(130)[0], max_new_tokens=60, eos_token_id=NO_END)
                (ending,) = collect(engine.stream([request]))[1].values()
                assert ending.reason == "length"


def test_a_capture_that_runs_out_of_memory_is_tried_again(monkeypatch, tiny_model, ids):
    emulate_steps(monkeypatch)
    run, calls = CacheGraph.run, itertools.count()

    def scarce(self, cache, kwargs):
        if next(calls) == 2:
            raise CaptureError("CUDA out of memory.")
        return run(self, cache, kwargs)

    monkeypatch.setattr(CacheGraph, "run", scarce)
    with attach(tiny_model(), config(prefetch="graph")) as engine:
        first = engine.generate(ids(90), max_new_tokens=8, eos_token_id=NO_END)
        assert engine.stats.captured_steps == 6  # of 7
        assert sum("out of memory" in message for message in engine.stats.fallbacks) == 1
        assert torch.equal(first, engine.generate(ids(90), max_new_tokens=8, eos_token_id=NO_END))


class TestFaultsOfASharedStep:
    """Kernels are emulated; a step over places can't be run by the host."""

    def requests(self, ids, count):
        return [Request(input_ids=p, max_new_tokens=9, eos_token_id=NO_END) for p in prompts(ids, (70, 90, 80)[:count])]

    def test_a_failed_capture_leaves_the_step_to_kernels(self, monkeypatch, tiny_model, ids):
        emulate_steps(monkeypatch)
        run = CacheGraph.run

        def fail(self, cache):
            raise CaptureError("it reads a value back")

        def capturing(self, cache, kwargs):  # as on a GPU
            if isinstance(self, PlacesGraph) and not self.eager_steps_left:
                self._capture(cache)
            return run(self, cache, kwargs)

        monkeypatch.setattr(CacheGraph, "_capture", fail)
        monkeypatch.setattr(CacheGraph, "run", capturing)
        with attach(tiny_model(), config(prefetch="graph")) as engine:
            requests = self.requests(ids, 2)
            tokens, endings = collect(engine.stream(requests, prefill_chunk_size=None))
            assert {ending.reason for ending in endings.values()} == {"length"}
            assert list(engine.stats.fallbacks) == ["the requests' step kernel by kernel: it reads a value back"]
            assert tokens == {request: one_by_one(engine, request) for request in requests}

    def test_out_of_memory_ends_those_that_share_it(self, monkeypatch, tiny_model, ids):
        emulate_steps(monkeypatch)
        with attach(tiny_model(), config(prefetch="graph")) as engine:
            requests = self.requests(ids, 3)
            expected = {request: one_by_one(engine, request) for request in requests}
            run, calls = CacheGraph.run, itertools.count()

            def scarce(self, cache, kwargs):
                if isinstance(self, PlacesGraph) and next(calls) == 3:
                    raise torch.OutOfMemoryError("no memory left")
                return run(self, cache, kwargs)

            monkeypatch.setattr(CacheGraph, "run", scarce)
            tokens, endings = collect(engine.stream(requests, places=2, prefill_chunk_size=None))
            assert [endings[request].reason for request in requests] == ["failed", "failed", "length"]
            for request in requests:
                assert tokens[request] == expected[request][: len(tokens[request])]
            assert len(tokens[requests[0]]) > 1
            assert engine.stats.requests == {"failed": 2, "length": 1}
            assert engine.runtime.memory.lent_bytes == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_matmul")
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("policy", "host_kv", "family"),
        [
            *[("predictor", "auto", "llama"), ("predictor", "int8", "llama"), ("quest", "auto", "llama")],
            *[("h2o", "auto", "llama"), ("predictor", "auto", "gemma3"), ("predictor", "auto", "gpt-oss")],
        ],
    )
    def test_captured_steps_of_several_requests(self, tiny_model, ids, policy, host_kv, family, dtype):
        model = tiny_model(family).to("cuda", dtype)
        settings = {"budget": 96, "sink": 32, "recent": 32, "policy": policy, "host_kv": host_kv}
        with attach(model, OffloadConfig(**settings)) as engine:
            requests = [
                Request(input_ids=ids(n, seed=n)[0], max_new_tokens=12 + n % 30, eos_token_id=NO_END)
                for n in (400, 90, 150, 1000, 20, 300)
            ]
            expected = {request: one_by_one(engine, request) for request in requests}
            before = engine.stats.captured_steps
            tokens, endings = collect(engine.stream(requests, places=3, prefill_chunk_size=None))
            if dtype == torch.float32:
                assert tokens == expected
            else:  # products of a batch round otherwise than those of one sequence
                assert [(len(one), one[0]) for one in tokens.values()] == [
                    (len(expected[request]), expected[request][0]) for request in tokens
                ]
            assert {ending.reason for ending in endings.values()} == {"length"}
            assert 0 < engine.stats.captured_steps - before < before  # steps are shared
            assert engine.stats.fallbacks == {}
            assert engine.runtime.memory.lent_bytes == 0

    @pytest.mark.slow
    def test_two_hundred_requests(self, tiny_model, ids):
        """1K to 64K tokens, some cancelled, some ending early: the same tokens, and all memory returns."""
        draw = random.Random(0)
        model = tiny_model(max_position_embeddings=1 << 17).to("cuda")
        with attach(model, OffloadConfig(budget=512)) as engine:
            requests = [
                Request(
                    input_ids=ids(int(1024 * 64 ** draw.random()), seed=n)[0],
                    max_new_tokens=draw.randint(1, 40),
                    eos_token_id=range(0, VOCABULARY, 31),  # some end early
                    id=n,
                )
                for n in range(200)
            ]
            expected = {request: one_by_one(engine, request, 4096) for request in requests}
            on_device = torch.cuda.memory_allocated()
            stream, cancelled = engine.stream(requests, places=6, max_length=66_000), set()
            tokens, endings = {request: [] for request in requests}, {}
            for request, token, ending in stream:
                tokens[request] += [] if token is None else [token]
                if ending is not None:
                    endings[request] = ending.reason
                if draw.random() < 0.02 and (victim := draw.choice(requests)) not in endings:
                    cancelled.add(victim)
                    stream.cancel(victim)
            assert {"eos", "length", "cancelled"} == set(endings.values())
            for request in requests:
                ended = endings[request] != "cancelled"
                assert ended or request in cancelled
                assert tokens[request] == expected[request][: None if ended else len(tokens[request])]
            engine.runtime.memory.check_integrity()
            assert engine.runtime.memory.lent_bytes == 0
            assert torch.cuda.memory_allocated() <= on_device + (8 << 20)
