"""Budgets by layer: what decides them, that nothing of the total is lost, that every part of a step honours them."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contracts import (
    beams,
    chunked_prefill,
    deep_copied_prefix,
    left_padded_batch,
    logits_of,
    next_turn,
    one_token_prompt,
    prompt_lookup,
)
from test_graph import emulated  # noqa: F401  # a fixture
from tiny_models import make_tiny_model

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.errors import ConfigError
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.allocation import PromptAllocation, first_budgets, mean_shares, share_budget
from attention_predictor.offload.policies.cake import entropy_and_shift, preference
from attention_predictor.offload.policies.query_similarity import query_similarity
from attention_predictor.offload.policy_names import BUILT_IN

SMALL = {"predictor": "ema", "budget": 96, "sink": 16, "recent": 16}
SELECTING = tuple(name for name in BUILT_IN if policy_class(name).selects != "all")


@torch.no_grad()
def uneven_model(layers=2):
    """The first layer's queries have much in common, those of the others little."""
    model = make_tiny_model("llama", num_hidden_layers=layers, attention_bias=True)
    model.model.layers[0].self_attn.q_proj.bias.fill_(1.0)
    return model


@torch.no_grad()
def decode(model, prompt, steps=12, each=lambda cache: None, **changes):
    """Greedy steps behind a prompt: the cache, and the logits of all steps; ``each(cache)`` sees it after every one."""
    with attach(model, OffloadConfig(**(SMALL | changes))) as engine:
        cache, logits = engine.new_cache(), []
        logits.append(model(prompt, **with_cache(model, cache)).logits[:, -1])
        for _ in range(steps):
            logits.append(model(logits[-1].argmax(-1, keepdim=True), **with_cache(model, cache)).logits[:, -1])
            each(cache)
        cache.check_integrity()
        engine.stats  # noqa: B018  # what the device has counted is added while the engine is open
    return cache, torch.stack(logits, 1)


def budgets_of(cache) -> list[int]:
    return [layer.selection.budget for layer in cache.layers]


# ---- query similarity ------------------------------------------------------------------------------------------------


def similarity_by_definition(query_TD: torch.Tensor) -> float:
    rows = query_TD.double().tolist()
    cosines = [
        math.fsum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))
        for i, one in enumerate(rows)
        for j, other in enumerate(rows)
        if i != j
    ]
    return math.fsum(cosines) / len(cosines)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(2, 32), common=st.floats(0, 30), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_similarity_is_the_mean_cosine_of_pairs(tokens, common, scale, seed):
    torch.manual_seed(seed)
    query_BHTD = scale * (torch.randn(2, 3, tokens, 8) + common * torch.randn(2, 3, 1, 8))
    found_BH = query_similarity(query_BHTD)
    assert found_BH.shape == (2, 3)
    for sequence in range(2):
        for head in range(3):
            true = similarity_by_definition(query_BHTD[sequence, head])
            assert found_BH[sequence, head] == pytest.approx(true, abs=1e-6)


def test_similarity_of_known_windows():
    alike, opposed = torch.ones(1, 1, 5, 4), torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]]]])
    assert query_similarity(alike).item() == pytest.approx(1)
    assert query_similarity(opposed).item() == pytest.approx(-1)
    assert query_similarity(torch.eye(6)[None, None]).item() == pytest.approx(0)
    assert query_similarity(alike[:, :, :1]).isnan().all()
    assert query_similarity(alike.half()).dtype == torch.float32


def test_similarity_leaves_padding_out():
    torch.manual_seed(0)
    query_BHTD, real_BT = torch.randn(3, 2, 9, 4), torch.ones(3, 9, dtype=torch.bool)
    real_BT[1, :5], real_BT[2, :8] = False, False
    found_BH = query_similarity(query_BHTD, real_BT)
    assert torch.allclose(found_BH[0], query_similarity(query_BHTD)[0])
    assert torch.allclose(found_BH[1], query_similarity(query_BHTD[1:2, :, 5:])[0])
    assert found_BH[2].isnan().all()  # a single query has no pair


# ---- what decides ----------------------------------------------------------------------------------------------------


def heard(monkeypatch) -> list:
    """What layers have told: queries, rows, and the preference that came of them."""
    told, tell = [], PromptAllocation._statistics

    def listening(self, layer, query_BHQD, rows, real_BL):
        told.append((layer, query_BHQD, rows, tell(self, layer, query_BHQD, rows, real_BL)))
        return told[-1][-1]

    monkeypatch.setattr(PromptAllocation, "_statistics", listening)
    return told


@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_qsim_budgets_follow_their_definition(tiny_model, ids, family, batch):
    """From the model's own projections: with and without groups of query heads, with and without QK-norm."""
    model, prompt = tiny_model(family, num_hidden_layers=4), ids(300, batch)
    queries = {}
    for number, block in enumerate(model.model.layers):
        last = getattr(block.self_attn, "q_norm", block.self_attn.q_proj)
        last.register_forward_hook(
            lambda module, args, out, number=number: queries.update({number: queries.get(number, out)})
        )
    cache, _ = decode(model, prompt)
    assert budgets_of(cache) == [96] * 4
    turn = model.model.rotary_emb(torch.zeros(1), torch.arange(300)[None])
    shares = []
    for number in range(4):
        query_BHTD = queries[number].detach().view(batch, 300, -1, 8).transpose(1, 2)
        half_BHTD = torch.cat([-query_BHTD[..., 4:], query_BHTD[..., :4]], -1)
        query_BHTD = query_BHTD * turn[0][:, None] + half_BHTD * turn[1][:, None]
        one_B = [
            1 - sum(similarity_by_definition(query_TD) for query_TD in query_HTD[:, -32:]) / 4
            for query_HTD in query_BHTD
        ]
        shares.append(one_B)
    share_YB = torch.tensor(shares) / torch.tensor(shares).sum(0)
    cache, _ = decode(model, prompt, budget_allocation="qsim", budget=16 * 200)
    expected = share_budget(OffloadConfig(**SMALL | {"budget": 16 * 200}), share_YB.mean(1).tolist())
    assert max(abs(ours - true) for ours, true in zip(budgets_of(cache), expected, strict=True)) <= 16  # of rounding
    assert len(set(expected)) > 1


def test_cake_budgets_follow_the_attention_map(tiny_model, ids):
    model, prompt = tiny_model(num_hidden_layers=3), ids(300)
    with torch.no_grad():
        attentions = model(prompt, output_attentions=True).attentions
    before = (300 - 32) // 16  # whole blocks before the window
    masses = [one[:, :, -32:, : 16 * before].unflatten(-1, (before, 16)).sum(-1) for one in attentions]
    preferences = torch.stack([preference(entropy_and_shift(mass.unflatten(1, (2, -1)).mean(2))) for mass in masses])
    expected = share_budget(
        OffloadConfig(**SMALL | {"budget": 4096}), (preferences / preferences.sum(0))[:, 0].tolist()
    )
    for policy in ("cake", "predictor", "pyramidkv", "streaming"):  # some want other rows than those, or none
        cache, _ = decode(model, prompt, budget_allocation="cake", policy=policy, budget=4096)
        assert max(abs(ours - true) for ours, true in zip(budgets_of(cache), expected, strict=True)) <= 16
    assert len(set(expected)) > 1


@pytest.mark.parametrize("allocation", ["qsim", "cake"])
def test_policies_see_the_rows_they_see_without_sharing(tiny_model, ids, allocation):
    model, prompt = tiny_model(), ids(300)
    for policy in ("snapkv", "pyramidkv", "h2o"):
        votes = [
            [layer.policy.parts["attention" if policy == "h2o" else "votes"].value_BGC for layer in cache.layers]
            for how in ("uniform", allocation)
            for cache in [decode(model, prompt, 0, budget_allocation=how, policy=policy)[0]]
        ]
        for one, other in zip(*votes, strict=True):
            assert torch.equal(one, other)


def test_preferences_that_say_nothing_share_equally():
    nan, config = math.nan, OffloadConfig(**SMALL)
    assert mean_shares(torch.tensor([[1.0, nan], [3.0, nan]])) == [0.25, 0.75]  # a sequence without two queries
    assert mean_shares(torch.tensor([[0.0, 2.0], [0.0, 2.0]])) == [0.5, 0.5]
    assert share_budget(config, mean_shares(torch.zeros(3, 1))) == [96] * 3
    assert share_budget(config, mean_shares(torch.full((3, 1), nan))) == [96] * 3


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=40),
    free=st.integers(0, 60),
    sink=st.integers(0, 4),
    recent=st.integers(0, 4),
    odd=st.integers(0, 15),
)
def test_the_total_is_conserved_and_every_layer_has_its_least(weights, free, sink, recent, odd):
    least = 16 * (sink + recent + 1)
    config = OffloadConfig(budget=least + 16 * free + odd, sink=16 * sink, recent=16 * recent)
    budgets = share_budget(config, weights)
    assert sum(budgets) == len(weights) * (least + 16 * free)
    assert all(budget % 16 == 0 and budget >= least for budget in budgets)


def test_short_forwards_leave_budgets_alone(ids, monkeypatch):
    told = heard(monkeypatch)
    model, prompt = uneven_model(3), ids(300)
    with torch.no_grad(), attach(model, OffloadConfig(**SMALL, budget_allocation="qsim")) as engine:
        cache, after = engine.new_cache(), []
        # A first prompt that shows nothing; one token; another turn; a draft of several tokens.
        for tokens in (1, 1, 200, 8):
            model(prompt[:, :tokens], **with_cache(model, cache))
            after.append((len(told), budgets_of(cache)))
        cache.check_integrity()
        cache.reset()
        assert budgets_of(cache) == [96] * 3
        model(prompt[:, :9], **with_cache(model, cache))  # however short, a first prompt decides
        assert len(told) == after[-1][0] + 3
    assert [count for count, _ in after] == [0, 0, 3, 3]
    assert after[0][1] == after[1][1] == [96] * 3
    assert after[2][1] == after[3][1] != [96] * 3


# ---- every part of a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", SELECTING)
@pytest.mark.parametrize("allocation", ["qsim", "cake", [48, 160, 48, 128]])
def test_steps_read_and_hold_their_layers_budget(ids, monkeypatch, policy, allocation):
    read, kind = {}, policy_class(policy)
    observe = kind.observe

    def watched(self, step):
        observe(self, step)
        read[id(self)] = max(int(step.attended_BGC.sum(-1).max()), read.get(id(self), 0))

    monkeypatch.setattr(kind, "observe", watched)
    model = uneven_model(4)
    cache, _ = decode(model, ids(300, batch=2), budget_allocation=allocation, policy=policy)
    budgets = budgets_of(cache)
    stats = cache.layers[0].runtime.stats
    assert sum(budgets) == 4 * 96
    assert len(set(budgets)) > 1
    assert stats.to_dict()["layer_budgets"] == budgets
    assert f"budgets by layer          {', '.join(map(str, budgets))}" in str(stats)
    for layer, budget in zip(cache.layers, budgets, strict=True):
        assert layer.policy.selection is layer.selection
        blocks = budget // 16
        held = blocks + int(OffloadConfig().reserve * blocks)
        assert layer.blocks.pool.slots == layer.selection.max_slots_at(312) == held
        assert read[id(layer.policy)] == budget // 16
        assert stats.device_bytes[layer.number]["pool"] == layer.blocks.pool.nbytes


def test_full_attention_has_no_budgets(ids):
    cache, _ = decode(uneven_model(), ids(100), 2, policy="full", budget_allocation="qsim")
    assert cache.layers[0].prompt_allocation is None
    assert cache.layers[0].runtime.stats.to_dict()["layer_budgets"] == []


@pytest.mark.parametrize("policy", SELECTING)
def test_exact_up_to_the_mean_budget(ids, policy):
    """174 tokens, also in layers that have less; one block less, and nothing is exact."""
    model, prompt = uneven_model(4), ids(150)
    stock = logits_of(model, prompt)
    for mean, exact in ((176, True), (128, False)):
        allocation = [48, mean, 2 * mean - 48, mean]
        with attach(
            model, OffloadConfig(**SMALL | {"budget": mean, "policy": policy, "budget_allocation": allocation})
        ):
            ours = logits_of(model, prompt)
        apart = max((one - other).abs().max() for one, other in zip(stock.logits, ours.logits, strict=True))
        assert (apart < 1e-4) == exact


@pytest.mark.parametrize("policy", ["predictor", "snapkv", "h2o", "lazy-eviction"])
def test_a_context_that_outgrows_the_mean_budget_gives_memory_back(ids, policy):
    """From 80 tokens on; a layer with less than the mean has room for all of them until there are more than 96."""
    model, prompt, found, held = uneven_model(3), ids(80), [], []
    for prefetch in ("thread", "none"):
        sizes = []
        _, logits = decode(
            model,
            prompt,
            30,
            each=lambda cache, sizes=sizes: sizes.append([layer.blocks.pool.slots for layer in cache.layers]),
            policy=policy,
            prefetch=prefetch,
            budget_allocation=[48, 80, 160],
        )
        found.append(logits)
        held.append(sizes)
    assert torch.equal(*found)
    assert held[0] == held[1]
    # Tokens cached, the step that comes makes one more: at 97 the budgets come into effect.
    assert [max(layers[0] for layers in held[0][:16]), held[0][16][0], held[0][-1][0]] == [9, 6, 6]
    assert held[0][-1] == [3 + 3, 5 + 5, 10 + 10]


@torch.no_grad()
@pytest.mark.parametrize(
    "mode",
    [beams, left_padded_batch, chunked_prefill, next_turn, deep_copied_prefix, prompt_lookup, one_token_prompt],
)
@pytest.mark.parametrize("policy", ["predictor", "cake", "h2o"])
def test_modes(ids, mode, policy):
    """The stock model's tokens where the budget covers the context; else the same tokens, threaded or not."""
    model, prompt = uneven_model(), ids(150)
    with attach(model, OffloadConfig(policy=policy, predictor="ema", budget_allocation="qsim")):
        ours = mode(model, prompt)
    assert torch.equal(ours, mode(model, prompt))
    sparse = []
    for prefetch in ("thread", "none"):
        small = OffloadConfig(**SMALL | {"policy": policy, "prefetch": prefetch, "budget_allocation": "qsim"})
        with attach(model, small):
            sparse.append(mode(model, prompt))
    assert torch.equal(*sparse)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("allocation", "tokens"),
    [
        ("qsim", 245),
        ("cake", 245),
        ([80, 112], 245),
        ([80, 112], 76),
        ("qsim", 76),
        ("qsim-heads", 245),
        ([(48, 144), (112, 80)], 245),
        ([(48, 144), (112, 80)], 76),
    ],
)
def test_captured_steps_have_the_same_budgets(emulated, ids, allocation, tokens):  # noqa: F811
    """Also from below the mean budget on, which is where the smaller one comes into effect."""
    settings = {"predictor": "default", "slab_blocks": 4, "budget_allocation": allocation}
    model, prompt, graphs = uneven_model(), ids(tokens), []

    def entered(cache):
        graphs.append(cache.layers[0]._cache_graph is not None)

    thread, one = decode(model, prompt, 24, **settings)
    graph, other = decode(model, prompt, 24, each=entered, prefetch="graph", **settings)
    assert torch.equal(one.argmax(-1), other.argmax(-1))
    assert budgets_of(graph) == budgets_of(thread)
    by_head = [budget for layer in graph.layers for budget in layer.selection.heads or [layer.selection.budget] * 2]
    assert sum(by_head) == 4 * 96
    assert len(set(by_head)) > 1
    assert graphs[-1]
    slots = [layer.blocks.pool.slots for layer in graph.layers]
    assert slots == [layer.selection.max_slots_at(300) for layer in graph.layers]
    assert not graph.layers[0].runtime.stats.fallbacks


# ---- budgets by KV head ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    heads=st.lists(st.integers(3, 12), min_size=1, max_size=4),
    length=st.integers(1, 400),
    padding=st.integers(0, 60),
    more=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_each_head_gets_its_own_best_blocks(heads, length, padding, more, seed):
    """As many as its budget allows, in the order of its scores: what a layer of that budget would give it."""
    config, padding_B = OffloadConfig(**SMALL), torch.tensor([min(padding, length - 1)])
    selection = Selection.of(config, tuple(16 * blocks for blocks in heads))
    scores = torch.randn(1, len(heads), -(-length // 16), generator=torch.Generator().manual_seed(seed))
    extent = Extent(torch.tensor([length]), padding_B, scores.shape[-1], 16)
    found = chosen_blocks(selection.limits(length, more), extent, scores)
    for g, blocks in enumerate(heads):
        limits = Selection.of(config, 16 * blocks).limits(length, more)
        assert torch.equal(found[:, g], chosen_blocks(limits, extent, scores[:, g : g + 1])[:, 0])
        assert int(found[0, g].sum()) <= max(blocks + more, 6)  # until the mean budget, 6 blocks, all are attended to
    assert selection.budget == 16 * max(heads)
    assert selection.min_budget == 16 * min(heads)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_qsim_by_head_follows_its_definition(tiny_model, ids, family):
    model, prompt, seen = tiny_model(family), ids(300), {}
    query_of, tell = query_similarity, PromptAllocation.record

    def listen(self, layer, query_BHQD, rows, real_BL):
        seen[layer.number] = query_BHQD
        tell(self, layer, query_BHQD, rows, real_BL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptAllocation, "record", listen)
        cache, _ = decode(model, prompt, budget_allocation="qsim-heads", budget=4096)
    turned = [1 - query_of(seen[n][:, :, -32:])[0].unflatten(0, (2, -1)).mean(1) for n in sorted(seen)]
    weights = torch.cat(turned).clamp_min(0)
    expected = share_budget(OffloadConfig(**SMALL | {"budget": 4096}), (weights / weights.sum()).tolist())
    found = [budget for layer in cache.layers for budget in layer.selection.heads or [layer.selection.budget] * 2]
    assert found == expected
    assert sum(found) == len(found) * 4096
    assert len(set(found)) > 1


@pytest.mark.parametrize("policy", SELECTING)
def test_steps_read_their_heads_budget(ids, monkeypatch, policy):
    budgets, read, kind = [(48, 144), (128, 64)], {}, policy_class(policy)
    observe = kind.observe

    def watched(self, step):
        observe(self, step)
        read.setdefault(id(self), []).append(step.attended_BGC.sum(-1).amax(0).tolist())

    monkeypatch.setattr(kind, "observe", watched)
    cache, _ = decode(uneven_model(), ids(300, batch=2), policy=policy, budget_allocation=budgets)
    assert cache.layers[0].runtime.stats.to_dict()["layer_budgets"] == budgets
    for layer, own in zip(cache.layers, budgets, strict=True):
        most = [max(attended) for attended in zip(*read[id(layer.policy)], strict=True)]
        assert most == [budget // 16 for budget in own]


@pytest.mark.parametrize("policy", ["predictor", "snapkv", "h2o", "lazy-eviction"])
def test_unequal_heads_are_exact_up_to_the_mean_budget(ids, policy):
    model, prompt = uneven_model(), ids(60)
    _, whole = decode(model, prompt, 30, policy="full")
    _, ours = decode(model, prompt, 30, policy=policy, budget_allocation=[(48, 144), (112, 80)])
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)


# ---- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_early_exit(ids):
    """Drafts by the model's own lower layers, whose cache has no others: these share among themselves."""
    model, prompt = uneven_model(4), ids(150)
    stock = model.generate(prompt, assistant_early_exit=2, max_new_tokens=24, do_sample=False)
    for budget in (1024, 96):
        with attach(model, OffloadConfig(**SMALL | {"budget": budget, "budget_allocation": "qsim"})) as engine:
            ours = model.generate(prompt, assistant_early_exit=2, max_new_tokens=24, do_sample=False)
        if budget == 1024:
            assert torch.equal(ours, stock)
        assert len(engine.stats.layer_budgets) == 4


@torch.no_grad()
def test_an_interrupted_prompt_leaves_nothing_behind(ids, monkeypatch):
    model, prompt = uneven_model(3), ids(300)
    with attach(model, OffloadConfig(**SMALL, budget_allocation="qsim")) as engine:
        cache = engine.new_cache()
        model(prompt[:, :100], **with_cache(model, cache))
        with monkeypatch.context() as broken:
            broken.setattr(
                type(model.model.layers[1].mlp), "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                model(prompt[:, 100:200], **with_cache(model, cache))
        cache.crop(0)
        cache.crop(100 - cache.get_seq_length())
        logits = [model(prompt[:, 100:], **with_cache(model, cache)).logits[:, -1]]
        cache.check_integrity()
        other = engine.new_cache()
        model(prompt[:, :100], **with_cache(model, other))
        logits.append(model(prompt[:, 100:], **with_cache(model, other)).logits[:, -1])
    assert budgets_of(cache) == budgets_of(other)
    assert torch.allclose(*logits, atol=1e-5)


def test_a_cache_is_freed_at_once(ids):
    """No cycle keeps it."""
    model = uneven_model()
    with torch.no_grad(), attach(model, OffloadConfig(**SMALL, budget_allocation="qsim")) as engine:
        cache = engine.new_cache()
        model(ids(200), **with_cache(model, cache))
        cache.check_integrity()
        held = weakref.ref(cache.layers[0])
        gc.disable()
        try:
            del cache
            assert held() is None
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (
            "fair",
            r"budget_allocation='fair' is not allowed: expected one of policy, uniform, pyramid, qsim, cake, ",
        ),
        (7, r"budget_allocation=7 is not allowed"),
        ([], r"budget_allocation=\[\] is not allowed: expected budgets that are multiples of block_size=16 from 48 on"),
        ([96, 32, 160], r"multiples of block_size=16 from 48 on"),
        ([96, 88, 104], r"multiples of block_size=16 from 48 on"),
        ([96, "96"], r"multiples of block_size=16 from 48 on"),
        ([96, 112], r"expected a total of 2 × 96 \(budget=96\) = 192, found 208"),
        ([96, (48, 160)], r"expected a total of 4 × 96 \(budget=96\) = 384, found 400"),
        ([(96, 96, 96), (48, 144)], r"expected as many budgets in each layer that has several"),
        ([(96, 96), (32, 160)], r"multiples of block_size=16 from 48 on"),
    ],
)
def test_bad_allocations(allocation, message):
    with pytest.raises(ConfigError, match=message):
        OffloadConfig(**SMALL, budget_allocation=allocation)


def test_budgets_of_another_number_of_layers():
    model = uneven_model()
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match="budget_allocation has 3 budgets: the model has 2 layers to offload"):
        attach(model, OffloadConfig(**SMALL, budget_allocation=[96, 80, 112]))
    assert model.config._attn_implementation == before
    with attach(model, OffloadConfig(**SMALL, budget_allocation=[96], skip_layers=[0])) as engine:
        assert engine.runtime.first_budgets == {1: 96}


def test_budgets_of_another_number_of_heads():
    with pytest.raises(ConfigError, match="budget_allocation has 3 budgets in a layer: it has 2 KV heads"):
        attach(uneven_model(), OffloadConfig(**SMALL, budget_allocation=[96, (48, 96, 144)]))


def test_an_odd_budget_is_counted_in_whole_blocks():
    config = OffloadConfig(**SMALL | {"budget": 100}, budget_allocation=(48, 144))
    assert first_budgets(config, 2) == [48, 144]


def test_rules_name_allocations():
    assert Rule.parse("snapkv,budget_allocation=qsim").settings == {"policy": "snapkv", "budget_allocation": "qsim"}
    parsed = Rule.parse("own: predictor,budget_allocation=256+768,late_fetch=0")
    assert parsed.settings == {"policy": "predictor", "budget_allocation": [256, 768], "late_fetch": 0.0}
    with pytest.raises(ConfigError, match=r"budget_allocation='256\+x' is not allowed: .* or a budget for each layer"):
        Rule.parse("predictor,budget_allocation=256+x")


def test_the_command_line(tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The lamp was lit and the rain went on. " * 40)
    words = ["generate", "--prompt-file", str(prompt), "--max-new-tokens", "2", "--budget", "256", "--json"]
    assert main([*words, "--budget-allocation", "qsim"]) == 0
    assert '"layer_budgets": [' in capsys.readouterr().out
    assert main([*words, "--budget-allocation", "256,256"]) == 2
    assert "budget_allocation has 2 budgets: the model has 8 layers to offload" in capsys.readouterr().err
    assert main([*words, "--budget-allocation", "fair"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
