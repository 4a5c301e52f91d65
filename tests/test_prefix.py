"""Prompts with a common beginning: read once, one copy in host memory, the same tokens."""

from __future__ import annotations

import pytest
import torch
from emulated import emulate_steps
from torch import Tensor

from attention_predictor import ConfigError, ContextLengthError, HostMemoryError, OffloadConfig, Prefix, Request, attach
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.policy_names import BUILT_IN

SMALL = {"predictor": "ema", "budget": 64, "sink": 16, "recent": 16, "block_size": 8, "slab_blocks": 2}
NO_END = 10**6


def requests_of(parts: list[Tensor], prefix: Prefix | None, document: Tensor, new: int = 9) -> list[Request]:
    """One request for each part behind the document, given as a prefix or as part of the prompt."""
    whole = [part if prefix is not None else torch.cat([document, part]) for part in parts]
    return [Request(input_ids=ids, max_new_tokens=new, eos_token_id=NO_END, prefix=prefix) for ids in whole]


def tokens_of(engine: Engine, requests: list[Request], **options: object) -> list[list[int]]:
    found: dict[Request, list[int]] = {request: [] for request in requests}
    for request, token, ending in engine.stream(requests, **options):  # type: ignore[arg-type]
        assert ending is None or ending.error is None
        if token is not None:
            found[request].append(token)
    return list(found.values())


@pytest.mark.parametrize(("policy", "host_kv"), [*((name, "auto") for name in BUILT_IN), ("predictor", "int8")])
def test_requests_behind_a_prefix_get_the_tokens_of_the_whole_prompt(tiny_model, ids, policy, host_kv) -> None:
    document = ids(112, seed=1)[0]
    parts = [ids(length, seed=length)[0] for length in (20, 1, 37)]
    with attach(tiny_model(), OffloadConfig(**SMALL, policy=policy, host_kv=host_kv)) as engine:
        expected = tokens_of(engine, requests_of(parts, None, document), places=1, prefill_chunk_size=len(document))
        prefix = engine.prefill(document)
        for places in (1, 3):
            requests = requests_of(parts, prefix, document)
            assert tokens_of(engine, requests, places=places, prefill_chunk_size=len(document)) == expected
        del prefix, requests
        assert engine.runtime.memory.lent_bytes == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_captured_steps_behind_a_prefix(tiny_model, ids, device, monkeypatch) -> None:
    if device == "cpu":
        emulate_steps(monkeypatch)
    model, document = tiny_model().to(device), ids(112, seed=1)[0]
    parts = [ids(length, seed=length)[0] for length in (20, 1, 37)]
    with attach(model, OffloadConfig(**SMALL, prefetch="graph")) as engine:
        expected = tokens_of(engine, requests_of(parts, None, document), places=1, prefill_chunk_size=len(document))
        prefix = engine.prefill(document.to(device))
        assert tokens_of(engine, requests_of(parts, prefix, document), places=3) == expected
        assert engine.stats.fallbacks == {}
        del prefix
        assert engine.runtime.memory.lent_bytes == 0


@pytest.mark.parametrize("prefetch", ["thread", "graph"])
def test_host_memory_holds_a_prefix_once(tiny_model, ids, prefetch, monkeypatch) -> None:
    """And admission counts it once: six requests fit where two whole prompts would not."""
    emulate_steps(monkeypatch)
    document, parts = ids(16 * 8 + 3, seed=1)[0], [ids(2, seed=seed)[0] for seed in range(6)]
    slab = 2 * 2 * 2 * 8 * 4 * 16  # keys and values of two layers and heads, fp32, 16 tokens
    # Nine slabs of the prefix, one of each request, a spare one of the places.
    limit = (9 + 6 + 1) * slab
    with attach(tiny_model(), OffloadConfig(**SMALL, prefetch=prefetch, host_memory=limit)) as engine:
        prefix, most = engine.prefill(document), 0
        assert engine.runtime.memory.lent_bytes == 9 * slab
        running: set[Request] = set()
        together = 0
        for request, _, ending in engine.stream(requests_of(parts, prefix, document, new=11), places=6):
            running.add(request)
            together, most = max(together, len(running)), max(most, engine.runtime.memory.lent_bytes)
            if ending is not None:
                assert ending.error is None
                running.remove(request)
        assert together == 6
        assert most <= limit
        with pytest.raises(HostMemoryError, match="host_memory allows"):
            engine.prefill(ids(16 * 8, seed=2)[0])


@pytest.mark.slow
def test_admission_counts_the_block_that_each_copy_of_coded_blocks_writes(tiny_model, ids) -> None:
    """At any limit that two requests fit one after the other, they end so side by side too."""
    document, parts = ids(96, seed=1)[0], [ids(20, seed=2)[0], ids(40, seed=3)[0]]
    model, tried, settings = tiny_model(), 0, SMALL | {"host_kv": "int8", "slab_blocks": 1}
    for limit in range(20 << 10, 60 << 10, 4 << 10):
        endings = []
        for places in (1, 2):
            with attach(model, OffloadConfig(**settings, host_memory=limit)) as engine:
                requests = requests_of(parts, engine.prefill(document), document, new=30)
                ends = [ending for _, _, ending in engine.stream(requests, places=places) if ending is not None]
                endings.append([ending.reason for ending in ends])
        if endings[0] == ["length", "length"]:
            tried += 1
            assert endings[1] == ["length", "length"], limit
    assert tried > 2


def test_a_prefix_serves_many_streams_and_outlives_their_ends(tiny_model, ids) -> None:
    document = ids(112, seed=1)[0]
    with attach(tiny_model(), OffloadConfig(**SMALL)) as engine:
        prefix = engine.prefill(document, prefill_chunk_size=50)
        found = [tokens_of(engine, requests_of([ids(9)[0]], prefix, document)) for _ in range(3)]
        assert found[0] == found[1] == found[2]
        stream = engine.stream(requests_of([ids(9)[0]], prefix, document))
        next(stream)
        stream.close()
        assert tokens_of(engine, requests_of([ids(9)[0]], prefix, document)) == found[0]


def test_bad_prefixes_are_refused(tiny_model, ids) -> None:
    model = tiny_model(max_position_embeddings=256)
    with attach(model, OffloadConfig(**SMALL)) as engine:
        for given, line in (
            ([], r"input_ids of a prefix must be \[tokens\] with at least one token, got \[\]"),
            (ids(5), r"input_ids of a prefix must be \[tokens\] .* got \[1, 5\]"),
            (torch.rand(5), "input_ids of a prefix must be whole numbers, got torch.float32"),
            ([1, NO_END], f"token {NO_END} in input_ids: the model has tokens from 0 to"),
        ):
            with pytest.raises(ConfigError, match=line):
                engine.prefill(given)
        with pytest.raises(ConfigError, match="prefill_chunk_size=0 is not allowed"):
            engine.prefill([1, 2], prefill_chunk_size=0)
        with pytest.raises(ContextLengthError):
            engine.prefill(ids(300)[0])
        prefix = engine.prefill(ids(200)[0])
        ((_, _, ending),) = engine.stream([Request(input_ids=[1] * 50, max_new_tokens=20, prefix=prefix)])
        assert isinstance(ending.error, ContextLengthError)
    with attach(model, OffloadConfig(**SMALL)) as engine:
        ((_, _, ending),) = engine.stream([Request(input_ids=[1], max_new_tokens=2, prefix=prefix)])
        assert "prefix: another engine has read it" in str(ending.error)
