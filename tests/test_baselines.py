"""What defines each baseline, on constructed cases; family by family, test_contracts.py takes them up by name."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contracts import (
    beams,
    chunked_prefill,
    deep_copied_prefix,
    inference_mode,
    left_padded_batch,
    logits_of,
    next_turn,
    one_token_prompt,
    prompt_lookup,
)

from attention_predictor import OffloadConfig, attach
from attention_predictor.errors import ConfigError, IntegrityError
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import NEVER
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies import LayerSpec, policy_class
from attention_predictor.offload.policies.allocation import allocation_of, first_budgets, mean_shares, share_budget
from attention_predictor.offload.policies.base import BlockValues, newest_first
from attention_predictor.offload.policies.cake import entropy_and_shift, preference
from attention_predictor.offload.policies.snapkv import pooled
from attention_predictor.offload.policy_names import BUILT_IN

BASELINES = ("h2o", "snapkv", "pyramidkv", "cake", "tappa", "lazy-eviction")
EVICTING = ("h2o", "lazy-eviction")
SMALL = {"budget": 96, "sink": 16, "recent": 16}
B, G, H, D, CAPACITY = 2, 2, 4, 8, 64


def make(policy: str, **changes):
    config = OffloadConfig(**(SMALL | {"policy": policy} | changes))
    return policy_class(policy)(LayerSpec(config, None, B, G, D, torch.float32, torch.device("cpu")))


def rows(scores_QN: torch.Tensor) -> ScoreRows:
    """The same rows for all sequences and heads, peak and mass alike."""
    scores_BGQN = scores_QN.float().expand(B, G, *scores_QN.shape)
    return ScoreRows(scores_BGQN, scores_BGQN)


def wanted(policy, length: int) -> set[int]:
    """The blocks that every sequence and head selects for the step at ``length`` tokens."""
    policy.reserve(CAPACITY)
    extent = Extent(torch.full((B,), length - 1), None, CAPACITY, 16)
    score_BGC = policy.score_next(extent)
    chosen_BGC = chosen_blocks(policy.selection.limits(length), extent.next, score_BGC, policy.unspent(extent))
    assert torch.equal(chosen_BGC, chosen_BGC[:1, :1].expand_as(chosen_BGC))
    return set(chosen_BGC[0, 0].nonzero().flatten().tolist())


def observing(monkeypatch, policy: str) -> list:
    """Pairs of a policy and each step that it observes."""
    seen, kind = [], policy_class(policy)
    observe = kind.observe

    def watched(self, step):
        observe(self, step)
        # What the slots hold now: the next step changes them in place.
        kept = copy.copy(step)
        kept.block_BGS = step.block_BGS.clone()
        seen.append((self, kept))

    monkeypatch.setattr(kind, "observe", watched)
    return seen


@torch.no_grad()
def decode(model, prompt, policy, steps=40, **changes):
    """A prompt and some greedy steps behind it; the cache and the tokens fed."""
    with attach(model, OffloadConfig(**(SMALL | {"policy": policy} | changes))) as engine:
        cache = engine.new_cache()
        tokens = [model(prompt, **with_cache(model, cache)).logits[:, -1:].argmax(-1)]
        for _ in range(steps):
            tokens.append(model(tokens[-1], **with_cache(model, cache)).logits[:, -1:].argmax(-1))
        cache.check_integrity()
    return cache, torch.cat([prompt, *tokens[:-1]], 1)


def attention_mass(model, tokens) -> list[torch.Tensor]:
    """The stock model's attention by layer, summed by block and averaged over the heads of a KV head, [B, G, Q, N]."""
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    blocks = (F.pad(one, (0, -one.shape[-1] % 16)).unflatten(-1, (-1, 16)).sum(-1) for one in attentions)
    return [one.unflatten(1, (G, -1)).mean(2) for one in blocks]


def spread(x_BGN: torch.Tensor) -> torch.Tensor:
    """The numbers of blocks with zeros behind them, as a policy that has room for more keeps them."""
    return F.pad(x_BGN, (0, CAPACITY - x_BGN.shape[-1]))


# ---- all of them -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("policy", BASELINES)
@pytest.mark.parametrize(
    "mode",
    [
        beams,
        left_padded_batch,
        chunked_prefill,
        next_turn,
        deep_copied_prefix,
        prompt_lookup,
        one_token_prompt,
        inference_mode,
    ],
)
def test_modes(tiny_model, ids, mode, policy):
    """The stock model's tokens where the budget covers the context; else the same tokens, threaded or not."""
    model, prompt = tiny_model("llama"), ids(150)
    with attach(model, OffloadConfig(policy=policy)):
        ours = mode(model, prompt)
    assert torch.equal(ours, mode(model, prompt))
    sparse = []
    for prefetch in ("thread", "none"):
        with attach(model, OffloadConfig(policy=policy, budget=64, sink=16, recent=16, prefetch=prefetch)):
            sparse.append(mode(model, prompt))
    assert torch.equal(*sparse)


@pytest.mark.parametrize("policy", BASELINES)
def test_a_step_reads_no_more_than_its_budget(tiny_model, ids, monkeypatch, policy):
    """Over both layers together, however they share it."""
    seen = observing(monkeypatch, policy)
    decode(tiny_model(), ids(300, batch=2), policy)
    read = [int(step.attended_BGC.sum(-1).max()) for _, step in seen]
    assert len(read) == 2 * 40
    assert all(lower + upper <= 2 * 96 // 16 for lower, upper in zip(read[::2], read[1::2], strict=True))


def test_those_that_evict_say_so(tiny_model, ids):
    assert {name for name in BUILT_IN if policy_class(name).evicts} == set(EVICTING)
    for policy in EVICTING:
        cache, _ = decode(tiny_model(), ids(100), policy, steps=2)
        assert "evicted" in cache.layers[0].runtime.stats.device_kv_parts()


@pytest.mark.parametrize("policy", EVICTING)
def test_what_is_evicted_never_comes_back(tiny_model, ids, monkeypatch, policy):
    seen = observing(monkeypatch, policy)
    decode(tiny_model(num_hidden_layers=1), ids(200, batch=2), policy, steps=150)
    left = 0
    for (_, before), (_, after) in itertools.pairwise(seen):
        before_BGN, after_BGN = (step.attended_BGC[..., : before.blocks] for step in (before, after))
        assert not (after_BGN & ~before_BGN).any()
        left += int((before_BGN & ~after_BGN).sum())
    assert left > 0


@torch.no_grad()
@pytest.mark.parametrize("policy", EVICTING)
def test_a_further_turn_brings_nothing_back(tiny_model, ids, monkeypatch, policy):
    seen = observing(monkeypatch, policy)
    model, prompt = tiny_model(num_hidden_layers=1), ids(300)
    with attach(model, OffloadConfig(**(SMALL | {"policy": policy}))) as engine:
        cache = engine.new_cache()
        model(prompt, **with_cache(model, cache))
        for turn in (prompt[:, :1], prompt[:, :20], prompt[:, :1], prompt[:, :1]):
            model(turn, **with_cache(model, cache))
            cache.check_integrity()
    (_, first), *later = seen
    assert len(later) == 2
    for _, step in later:
        assert not (step.attended_BGC & ~first.attended_BGC)[..., : first.blocks].any()


def test_what_a_step_has_seen(tiny_model, ids, monkeypatch):
    """The exact row, where a step attends to everything; normalised over what it attends to, where not."""
    for budget in (1024, 96):
        seen = observing(monkeypatch, "h2o")
        decode(tiny_model(num_hidden_layers=1), ids(300, batch=2), "h2o", steps=3, budget=budget)
        for _, step in seen:
            for ours, exact in zip((step.score_BGC, step.mass_BGC), step.exact, strict=True):
                assert ours.shape == (2, G, step.extent.capacity)
                assert exact.shape == (2, G, 1, step.blocks)
                whole = F.pad(exact[:, :, 0], (0, step.extent.capacity - step.blocks))
                if budget == 1024:
                    assert (ours - whole).abs().max() < 1e-5
                else:
                    assert (ours[~step.attended_BGC] == 0).all()
                    assert (ours[step.attended_BGC] >= whole[step.attended_BGC] - 1e-6).all()
            assert (step.mass_BGC.sum(-1) - 1).abs().max() < 1e-5
        monkeypatch.undo()


class TestBlockValues:
    spec = LayerSpec(OffloadConfig(), None, B, G, D, torch.float32, torch.device("cpu"))

    def test_follow_their_sequences(self):
        values = BlockValues(self.spec, 7.0)
        values.reserve(3)
        assert values.value_BGC.tolist() == [[[7.0] * 3] * G] * B
        values.value_BGC[:] = torch.arange(B)[:, None, None]
        values.reserve(5)
        values.reserve(2)
        values.index(torch.tensor([1, 1, 0]))
        assert values.value_BGC[:, 0].tolist() == [[1, 1, 1, 7, 7], [1, 1, 1, 7, 7], [0, 0, 0, 7, 7]]
        assert values.nbytes == 3 * G * 5 * 4
        values.crop(2)
        assert values.value_BGC[0, 0].tolist() == [1, 1, 7, 7, 7]
        values.check_integrity()

    def test_truth_values(self):
        values = BlockValues(self.spec, False)
        values.reserve(4)
        assert values.value_BGC.dtype == torch.bool
        assert not values.value_BGC.any()
        values.check_integrity()

    def test_nan_is_found(self):
        values = BlockValues(self.spec, math.nan)
        values.reserve(2)
        with pytest.raises(IntegrityError, match="2 blocks: some are NaN"):
            values.check_integrity()

    def test_written_to_within_inference_mode_and_outside_of_it(self):
        with torch.inference_mode():
            values = BlockValues(self.spec)
            values.reserve(2)
            values.value_BGC += 1
        values.value_BGC += 1
        assert values.value_BGC.tolist() == [[[2.0] * 2] * G] * B


def test_newest_first():
    scores = torch.tensor([[[0.5, NEVER, 3.0, 0.1, 0.2]]]).expand(2, -1, -1)
    extent = Extent(torch.tensor([80, 80]), None, 5, 16)
    ordered = newest_first(scores, torch.tensor([[3], [5]]), extent)
    assert ordered[0, 0].argsort(descending=True).tolist() == [4, 3, 2, 0, 1]
    assert torch.equal(ordered[1], scores[1])
    nothing = newest_first(torch.full((2, 1, 5), NEVER), torch.tensor([[3], [4]]), extent)
    assert nothing[:, 0].tolist() == [[NEVER] * 3 + [1.0, 2.0], [NEVER] * 4 + [1.0]]


# ---- H2O -------------------------------------------------------------------------------------------------------------


def test_h2o_accumulates_all_attention(tiny_model, ids):
    """Over the whole of a prompt and all steps, where nothing is evicted: the column sums of the attention map."""
    model = tiny_model()
    cache, tokens = decode(model, ids(150, batch=2), "h2o", steps=20, budget=1024)
    for layer, mass_BGQN in zip(cache.layers, attention_mass(model, tokens), strict=True):
        assert (spread(mass_BGQN.sum(2)) - layer.policy.attention.value_BGC).abs().max() < 1e-3
        assert not layer.policy.evicted.value_BGC.any()


def test_h2o_accumulates_over_chunks(tiny_model, ids, monkeypatch):
    monkeypatch.setattr(policy_class("h2o"), "prompt_rows", 40)
    model, prompt = tiny_model(), ids(150)
    with torch.no_grad(), attach(model, OffloadConfig(policy="h2o")) as engine:
        cache = engine.new_cache()
        for chunk in prompt.split(40, dim=1):
            model(chunk, **with_cache(model, cache))
    for layer, mass_BGQN in zip(cache.layers, attention_mass(model, prompt), strict=True):
        assert (spread(mass_BGQN.sum(2)) - layer.policy.attention.value_BGC).abs().max() < 1e-3


def test_h2o_keeps_the_newest_half_and_the_heavy_hitters():
    """320 tokens and a budget of 6 blocks: sink, the newest 48 tokens' 4 blocks at most, the heaviest of the rest."""
    policy = make("h2o")
    early, recent_look = torch.zeros(20), torch.zeros(20)
    early[5], recent_look[9] = 0.9, 0.8
    policy.observe_rows(rows(torch.stack([early] * 3 + [recent_look])))
    # Block 9 is what the last query looks at; block 5 has had more attention in all.
    assert wanted(policy, 320) == {0, 5, 16, 17, 18, 19} - {16} | {9}
    assert wanted(policy, 321) == {0, 5, 17, 18, 19, 20}


# ---- blocks of one token: the published formulas themselves ----------------------------------------------------------


def published_snapkv(attention_BHQK: torch.Tensor, window: int) -> torch.Tensor:
    """SnapKV's scores of the keys before the window, by KV head: Li et al., listing 1, average pooling."""
    votes_BHK = attention_BHQK[:, :, -window:, :-window].mean(2)
    return F.avg_pool1d(votes_BHK, 5, stride=1, padding=2).unflatten(1, (G, -1)).mean(2)


def published_cake(attention_BHQK: torch.Tensor, window: int) -> torch.Tensor:
    """CAKE's indicator with γ = 200; of the mean of the query heads, as here."""
    rows_BGQK = attention_BHQK[:, :, -window:, :-window].unflatten(1, (G, -1)).mean(2)
    return F.avg_pool1d(rows_BGQK.mean(2) + 200 * rows_BGQK.var(2), 5, stride=1, padding=2)


def published_h2o(attention_BHQK: torch.Tensor, window: int) -> torch.Tensor:
    """H2O's accumulated scores, algorithm 1: all attention that a key has had."""
    return attention_BHQK.unflatten(1, (G, -1)).mean(2).sum(2)[..., :-window]


@pytest.mark.parametrize(
    ("policy", "scores", "window"),
    [
        ("snapkv", published_snapkv, 32),
        ("pyramidkv", published_snapkv, 8),
        ("cake", published_cake, 32),
        ("tappa", published_cake, 32),
        ("h2o", published_h2o, None),
        ("streaming", None, None),
    ],
)
def test_with_blocks_of_one_token_the_choice_is_the_published_one(tiny_model, ids, policy, scores, window):
    """Of the first step, for every layer and head: the newest tokens, and the best by the formula of those before."""
    model, prompt, budget = tiny_model(), ids(300, batch=2), 97
    sink, recent = (4, 0) if policy == "streaming" else (0, window or 0)
    settings = {"policy": policy, "block_size": 1, "budget": budget, "sink": sink, "recent": recent}
    with torch.no_grad():
        attentions = model(prompt, output_attentions=True).attentions
        with attach(model, OffloadConfig(**settings)) as engine:
            cache = engine.new_cache()
            model(prompt, **with_cache(model, cache))
            cache.check_integrity()
    for layer, attention_BHQK in zip(cache.layers, attentions, strict=True):
        own = layer.selection.budget - 1  # of the prompt's tokens; one is the next
        newest = {"h2o": budget // 2 - 1, "streaming": own - sink}.get(policy, window)
        chosen = [set(range(300 - newest, 300)) | set(range(sink)) for _ in range(B * G)]
        if scores is not None:
            best_BGK = scores(attention_BHQK, newest).topk(own - newest).indices
            chosen = [one | set(best) for one, best in zip(chosen, best_BGK.flatten(0, 1).tolist(), strict=True)]
        ours = [set(row) - {-1, 300} for row in layer.blocks.active_BGS.flatten(0, 1).tolist()]
        assert [len(one) for one in ours] == [own] * (B * G)
        assert ours == chosen
    if policy == "pyramidkv":  # 9 tokens, and 1.95 or 0.05 times the 88 others
        assert [layer.selection.budget for layer in cache.layers] == [97 + 84, 97 - 84]


# ---- SnapKV ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 12),
    kernel=st.sampled_from([1, 3, 5, 7, 15]),
    block_size=st.sampled_from([1, 2, 4, 8, 16, 32]),
    seed=st.integers(0, 99),
)
def test_pooled_is_average_pooling_over_tokens(blocks, kernel, block_size, seed):
    torch.manual_seed(seed)
    sums = torch.rand(2, 3, blocks)
    tokens = (sums / block_size).repeat_interleave(block_size, -1)
    true = F.avg_pool1d(tokens, kernel, stride=1, padding=kernel // 2).unflatten(-1, (blocks, block_size)).sum(-1)
    assert (pooled(sums, kernel, block_size) - true).abs().max() < 1e-5


def pooled_apart(votes_BGN: torch.Tensor, window: int) -> torch.Tensor:
    """Pooled over 5 tokens of blocks of 16, the last ``window`` blocks by themselves."""
    before_BGN, window_BGN = votes_BGN.split([votes_BGN.shape[-1] - window, window], -1)
    return torch.cat([pooled(before_BGN, 5, 16), pooled(window_BGN, 5, 16)], -1)


@pytest.mark.parametrize("chunk", [300, 100])
def test_snapkv_votes_are_the_windows(tiny_model, ids, chunk):
    model, prompt = tiny_model(), ids(300, batch=2)
    with torch.no_grad(), attach(model, OffloadConfig(**(SMALL | {"policy": "snapkv"}))) as engine:
        cache = engine.new_cache()
        for part in prompt.split(chunk, dim=1):
            model(part, **with_cache(model, cache))
    for layer, mass_BGQN in zip(cache.layers, attention_mass(model, prompt), strict=True):
        votes_BGN = mass_BGQN[:, :, -32:].mean(2)
        assert (spread(pooled_apart(votes_BGN, 2)) - layer.policy.votes.value_BGC).abs().max() < 1e-4


def test_snapkv_a_short_last_chunk_has_its_share_of_the_window():
    policy, votes = make("snapkv"), torch.rand(40, 20)
    policy.observe_rows(rows(votes[:32]))
    policy.observe_rows(rows(votes[32:]))
    expected = 0.75 * votes[:32].mean(0) + 0.25 * votes[32:].mean(0)
    assert (policy.votes.value_BGC - pooled_apart(expected.expand(B, G, 20), 2)).abs().max() < 1e-6


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "cake", "tappa"])
def test_static_selection(tiny_model, ids, monkeypatch, policy):
    """Decoding changes no vote; blocks before the window only ever leave, those with the fewest votes first."""
    seen = observing(monkeypatch, policy)
    cache, _ = decode(tiny_model(num_hidden_layers=1), ids(320), policy, steps=80, budget=160)
    votes_GC = cache.layers[0].policy.votes.value_BGC[0]
    assert not votes_GC[:, 20:].any()
    voted = 19 if policy == "pyramidkv" else 18  # blocks before the window of 8 or 32 queries
    before = [set(range(18))] * G
    for policy_object, step in seen:
        assert torch.equal(policy_object.votes.value_BGC[0], votes_GC)
        newest = min(step.blocks - 2, voted)  # recent tokens, the window, and all that has been generated
        for head in range(G):
            best = votes_GC[head, 1:newest].topk(10 - 1 - (step.blocks - newest)).indices + 1
            kept = set(step.attended_BGC[0, head].nonzero().flatten().tolist())
            assert kept == {0} | set(best.tolist()) | set(range(newest, step.blocks))
            assert kept & set(range(18)) <= before[head]
            before[head] = kept & set(range(18))
    assert len(before[0]) < len(seen[0][1].attended_BGC[0, 0, :18].nonzero())


# ---- PyramidKV -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    n_layers=st.integers(1, 80),
    free=st.integers(0, 300),
    sink=st.integers(0, 4),
    recent=st.integers(0, 4),
    odd=st.integers(0, 15),
)
def test_pyramid_budgets(n_layers, free, sink, recent, odd):
    """The total is exactly that of equal budgets, no layer has more than the one below, each has the least it needs."""
    least = 16 * (sink + recent + 1)
    config = OffloadConfig(policy="pyramidkv", budget=least + 16 * free + odd, sink=16 * sink, recent=16 * recent)
    budgets = first_budgets(config, n_layers)
    assert sum(budgets) == n_layers * (least + 16 * free)
    assert all(budget % 16 == 0 and budget >= least for budget in budgets)
    assert all(below >= above for below, above in itertools.pairwise(budgets))


def test_pyramid_falls_by_equal_steps_to_a_twentieth():
    # 400 blocks free in each layer
    budgets = first_budgets(OffloadConfig(policy="pyramidkv", budget=16 * (9 + 400)), 39)
    free = [budget // 16 - 9 for budget in budgets]
    assert free == [780 - 20 * layer for layer in range(39)]
    assert free[-1] == 400 / 20
    assert policy_class("pyramidkv").prompt_rows == 8


def test_pyramid_layers_attend_to_their_own_budgets(tiny_model, ids, monkeypatch):
    seen = observing(monkeypatch, "pyramidkv")
    cache, _ = decode(tiny_model(num_hidden_layers=4), ids(300), "pyramidkv")
    budgets = [layer.selection.budget for layer in cache.layers]
    assert sum(budgets) == 4 * 96
    assert budgets[0] > budgets[-1]
    assert [int(step.attended_BGC.sum(-1).max()) for _, step in seen] == [budget // 16 for budget in budgets] * 40


@pytest.mark.parametrize(("budget", "exact"), [(176, True), (160, False)])
def test_pyramid_is_exact_up_to_the_mean_budget(tiny_model, ids, budget, exact):
    """Also in layers that have less; 174 tokens."""
    model, prompt = tiny_model(num_hidden_layers=4), ids(150)
    outputs = [logits_of(model, prompt)]
    with attach(model, OffloadConfig(policy="pyramidkv", budget=budget)):
        outputs.append(logits_of(model, prompt))
    apart = max((ours - stock).abs().max() for stock, ours in zip(*(one.logits for one in outputs), strict=True))
    assert (apart < 1e-4) == exact


def test_how_layers_share_by_default():
    others = {"pyramidkv": "pyramid", "cake": "cake", "tappa": "qsim"}
    for name in BUILT_IN:
        config = OffloadConfig(budget=512, policy=name)
        assert allocation_of(config) == others.get(name, "uniform")
        if name != "pyramidkv":
            assert first_budgets(config, 8) == [512] * 8


def test_a_policy_of_an_unknown_allocation_is_refused(monkeypatch):
    """Not given equal budgets in silence."""
    monkeypatch.setattr(policy_class("h2o"), "allocation", "pyramide")
    with pytest.raises(
        ConfigError, match=r"the allocation of policy 'h2o' is 'pyramide': expected one of uniform, pyr"
    ):
        first_budgets(OffloadConfig(policy="h2o"), 8)


def test_share_budget_by_any_weights():
    config = OffloadConfig(budget=160, sink=16, recent=16)  # 3 blocks at least, 7 to share a layer
    assert share_budget(config, [0.0, 0.0, 0.0]) == [160] * 3
    assert share_budget(config, [1.0, 0.0]) == [48 + 14 * 16, 48]
    assert share_budget(config, [1.0, 1.0, 1.0, 4.0]) == [48 + 16 * more for more in (4, 4, 4, 16)]
    assert share_budget(config, [2.0, 1.0]) == [48 + 9 * 16, 48 + 5 * 16]


# ---- CAKE ------------------------------------------------------------------------------------------------------------


def test_cake_prefers_what_is_looked_at_now_and_then():
    """Of two blocks with the same mean attention, the one that has it at once."""
    steady, sudden = torch.full((32,), 0.01), torch.zeros(32)
    sudden[20] = 0.32
    mass_QN = torch.zeros(32, 20)
    mass_QN[:, 4], mass_QN[:, 10] = steady, sudden
    cake, snapkv = make("cake"), make("snapkv")
    for policy in (cake, snapkv):
        policy.observe_rows(rows(mass_QN))
    votes = cake.votes.value_BGC[0, 0, :20]
    expected = mass_QN.mean(0) + 200 * mass_QN.var(0)
    assert torch.allclose(votes, pooled_apart(expected[None, None], 2)[0, 0])
    assert votes[10] > 10 * votes[4]
    assert torch.isclose(*snapkv.votes.value_BGC[0, 0, [4, 10]])


def test_cake_of_a_single_query_has_no_variance():
    policy = make("cake")
    policy.observe_rows(rows(torch.rand(1, 20)))
    policy.check_integrity()


def test_cake_shares_equal_their_definition():
    torch.manual_seed(0)
    layers = [torch.rand(B, G, 32, 25).softmax(-1) ** power for power in (1, 2, 4)]
    for tau1, tau2 in ((1.0, 1.0), (1.6, 0.4)):
        preferences = []
        for mass_BGQN in layers:
            one = []
            for sequence in mass_BGQN.double():
                entropy = -sum(p * math.log(p) for p in sequence.flatten().tolist())
                columns = sequence.transpose(1, 2).reshape(-1, 32).tolist()
                shift = sum(sum((p - sum(c) / 32) ** 2 for p in c) / 31 for c in columns)
                one.append(entropy ** (1 / tau1) * shift ** (1 / tau2))
            preferences.append(one)
        expected = torch.tensor(preferences) / torch.tensor(preferences).sum(0)
        preference_YB = torch.stack([preference(entropy_and_shift(mass_BGQN), tau1, tau2) for mass_BGQN in layers])
        assert preference_YB.shape == (3, B)
        assert torch.allclose(preference_YB / preference_YB.sum(0), expected, rtol=1e-3)
        assert torch.allclose(torch.tensor(mean_shares(preference_YB)), expected.mean(1), rtol=1e-3)


def test_cake_wants_room_where_attention_is_spread_and_shifts():
    concentrated, spread = torch.zeros(1, 1, 32, 20), torch.full((1, 1, 32, 20), 0.05)
    concentrated[..., 3] = 1.0
    moving = torch.eye(20).repeat(2, 1)[None, None, :32]
    assert preference(entropy_and_shift(concentrated)) == 0  # no entropy, no shift
    assert preference(entropy_and_shift(spread)) < 1e-6  # it never shifts
    assert (
        preference(entropy_and_shift(0.5 * spread + 0.5 * moving))
        > preference(entropy_and_shift(0.9 * spread + 0.1 * moving))
        > 0
    )


# ---- LazyEviction ----------------------------------------------------------------------------------------------------


def lazily(steps_SN: torch.Tensor, **changes):
    policy = make("lazy-eviction", **changes)
    policy.observe_rows(rows(steps_SN))
    return policy


def test_lazy_eviction_keeps_what_recurs():
    """A block that is looked at every 12th query, 11 queries ago for the last time, beside one that had more in all.

    H2O drops it for the steady trickle to other blocks, and so does whoever looks at the last row alone.
    """
    attention_QN = torch.zeros(60, 30)
    attention_QN[:, 10:20] = 4e-4  # below α, and in sum above what block 5 has had
    attention_QN[::12, 5] = 4e-3
    lazy, h2o, last = lazily(attention_QN), make("h2o"), make("snapkv")
    h2o.observe_rows(rows(attention_QN))
    last.observe_rows(rows(attention_QN[-1:]))
    assert attention_QN[:, 10].sum() > attention_QN[:, 5].sum()
    assert 5 in wanted(lazy, 480)
    assert 5 not in wanted(h2o, 480)
    assert 5 not in wanted(last, 480)


def test_lazy_eviction_drops_what_is_overdue():
    """Two blocks of the same interval: the one that should have come back long ago goes first."""
    attention_QN = torch.zeros(80, 30)
    attention_QN[0:80:8, 5] = attention_QN[0:40:8, 7] = 0.01
    policy = lazily(attention_QN)
    importance = policy.importance()[0, 0]
    assert importance[5] > importance[7] > 0 > importance[10] > importance[9]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 60))
def test_lazy_eviction_importance_equals_its_definition(seed, steps):
    torch.manual_seed(seed)
    attention_QN = torch.rand(steps, 12) * 1e-3 * (torch.rand(steps, 12) < 0.3)
    policy = lazily(attention_QN[:1])
    for row in attention_QN[1:]:
        policy.observe_rows(rows(row[None]))
    for block in range(12):
        last, longest = 0, 0
        for step, value in enumerate(attention_QN[:, block].tolist(), 1):
            if value >= 5e-4:
                longest, last = max(longest, step - last), step
        importance = policy.importance()[0, 0, block].item()
        if longest:
            overdue, often = (steps - last) / longest, longest - 1
            expected = 2 / (1 + math.exp(overdue)) + 2 / (1 + math.exp(often))
            assert importance == pytest.approx(expected, abs=1e-5)
        else:
            assert importance < 0


def test_lazy_eviction_lags(tiny_model, ids, monkeypatch):
    """Several blocks at a time, every 32 tokens; between times nothing leaves, and the budget holds throughout."""
    seen = observing(monkeypatch, "lazy-eviction")
    settings = {"budget": 192, "sink": 16, "recent": 32}
    decode(tiny_model(num_hidden_layers=1), ids(300), "lazy-eviction", steps=150, **settings)
    held = [step.attended_BGC.sum(-1) for _, step in seen]
    assert max(int(one.max()) for one in held) == 192 // 16
    left = [
        int((before.attended_BGC & ~after.attended_BGC).sum(-1).max())
        for (_, before), (_, after) in itertools.pairwise(seen)
    ]
    evictions = [number for number, blocks in enumerate(left) if blocks]
    assert all(left[number] == 2 for number in evictions)
    assert {after - before for before, after in itertools.pairwise(evictions)} == {32}


def test_lazy_eviction_after_a_crop(tiny_model, ids):
    """Cropped far behind what was evicted, it counts what is left and evicts anew."""
    model = tiny_model(num_hidden_layers=1)
    with torch.no_grad(), attach(model, OffloadConfig(**(SMALL | {"policy": "lazy-eviction"}))) as engine:
        cache = engine.new_cache()
        model(ids(300), **with_cache(model, cache))
        for length in (250, 120, 40):
            cache.crop(length - cache.get_seq_length())
            for token in ids(40).split(1, dim=1):
                model(token, **with_cache(model, cache))
                cache.check_integrity()
                active_BGS = cache.layers[0].blocks.active_BGS
                assert int((active_BGS >= 0).sum(-1).max()) <= 96 // 16


@pytest.mark.parametrize("policy", EVICTING)
def test_what_is_attended_to_after_a_crop_is_held_again(tiny_model, ids, policy):
    """No block that a step attends to counts as evicted, so that the budget fills up again."""
    model = tiny_model(num_hidden_layers=1)
    with torch.no_grad(), attach(model, OffloadConfig(**(SMALL | {"policy": policy}))) as engine:
        cache = engine.new_cache()
        model(ids(300), **with_cache(model, cache))
        for token in ids(40).split(1, dim=1):
            model(token, **with_cache(model, cache))
        cache.crop(200 - cache.get_seq_length())
        for token in ids(40).split(1, dim=1):
            blocks, policy_of_layer = cache.layers[0].blocks, cache.layers[0].policy
            model(token, **with_cache(model, cache))
        blocks.settle()
        evicted_BGC = policy_of_layer.evicted.value_BGC
        held_BG = (~evicted_BGC & blocks.extent.begun_BC[:, None]).sum(-1)
        assert int(held_BG.min()) >= 96 // 16 - 2
        active_BGC = blocks.table.active_RC(evicted_BGC.shape[-1]).view_as(evicted_BGC)
        assert not (active_BGC & evicted_BGC).any()
