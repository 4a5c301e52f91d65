"""What defines each policy, on constructed cases; that all are exact within the budget is in test_contracts.py."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_predictor import OffloadConfig, attach
from attention_predictor.offload.attention.dense import Terms, scaled_logits
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies import LayerSpec, Policy, policy_class
from attention_predictor.offload.policies.predictor import PredictorPolicy
from attention_predictor.offload.policies.quest import KeyBounds, QuestAhead
from attention_predictor.offload.policy_names import BUILT_IN
from attention_predictor.predictor.scores import block_peak_and_sum

SMALL = {"predictor": "ema", "budget": 96, "sink": 16, "recent": 16}
B, G, H, D = 2, 2, 4, 8


def spec(**changes) -> LayerSpec:
    return LayerSpec(OffloadConfig(**(SMALL | changes)), None, B, G, D, torch.float32, torch.device("cpu"))


@torch.no_grad()
def decode(model, prompt, steps=12, each=lambda cache: None, **changes):
    """A few greedy steps; ``each(cache)`` sees the cache after every one."""
    with attach(model, OffloadConfig(**(SMALL | changes))) as engine:
        cache = engine.new_cache()
        token = model(prompt, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        for _ in range(steps):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            each(cache)
        return engine.stats


SELECTING = tuple(name for name in BUILT_IN if policy_class(name).selects != "all")


def attended(monkeypatch, policy: str) -> dict[Policy, list[torch.Tensor]]:
    """Blocks that each step attends to, counted by sequence and KV head, under each layer's policy."""
    kind, counts = policy_class(policy), {}
    observe = kind.observe

    def watched(self, step):
        counts.setdefault(self, []).append((step.block_BGS >= 0).sum(-1))
        observe(self, step)

    monkeypatch.setattr(kind, "observe", watched)
    return counts


@pytest.mark.parametrize(
    "allocation", ["uniform", [192, 128], [(176, 192), (144, 128)]], ids=["uniform", "by layer", "by head"]
)
@pytest.mark.parametrize("policy", SELECTING)
def test_a_step_attends_to_the_whole_budget(tiny_model, ids, monkeypatch, policy, allocation):
    """Once the context exceeds it: its blocks, the newest perhaps partly filled, no fewer and no more.

    LazyEviction alone attends to fewer for a while: where W tokens are two blocks, it evicts two at a time.
    """
    settings = {"policy": policy, "budget": 160, "recent": 32, "budget_allocation": allocation}
    counts = attended(monkeypatch, policy)
    real = torch.ones(2, 300, dtype=torch.long)
    real[1, :37] = 0
    with attach(tiny_model(), OffloadConfig(**SMALL | settings)) as engine:
        engine.model.generate(ids(300, batch=2), attention_mask=real, do_sample=False, max_new_tokens=21)
    layers = [160, 160] if allocation == "uniform" else allocation
    assert list(engine.stats.layer_budgets.values()) == layers
    for steps, budget in zip(counts.values(), layers, strict=True):
        blocks_G = torch.tensor(budget if isinstance(budget, tuple) else (budget, budget)) // 16
        found_SBG = torch.stack(steps)
        assert len(found_SBG) == 20
        assert torch.equal(found_SBG.amax((0, 1)), blocks_G)
        assert torch.equal(found_SBG.amin((0, 1)), blocks_G - (1 if policy == "lazy-eviction" else 0))


def test_streaming_reads_the_sink_and_the_newest(tiny_model, ids):
    """And fetches what the first step reads: all further blocks are written where they are read."""

    def check(cache):
        layer = cache.layers[0]
        layer.check_integrity()  # which waits for what the next token was promised
        n_blocks = -(-(layer.blocks.store.length + 1) // 16)
        blocks = set(layer.blocks.table.active_RS.flatten().tolist()) - {-1}
        assert blocks == {0} | set(range(n_blocks - 5, n_blocks))

    stats = decode(tiny_model(), ids(300), policy="streaming", each=check, steps=40)
    assert stats.late_blocks == 0
    # Two layers, two KV heads, of 6 blocks the 5 that are no new one, of 16 tokens' keys and values in fp32.
    assert stats.fetched_bytes <= 2 * 2 * 6 * 16 * 2 * 8 * 4


def test_full_streams_everything_and_keeps_nothing(tiny_model, ids):
    stats = decode(tiny_model(), ids(300), policy="full")
    assert stats.device_kv_bytes == 0
    assert stats.streamed_bytes >= 12 * 300 * 2 * 2 * 2 * 8 * 4


def test_oracle_is_the_best_selection(tiny_model, ids):
    model, prompt = tiny_model(), ids(300)
    found = {
        policy: decode(model, prompt, policy=policy, measure_recovery=1)
        for policy in ("oracle", "quest", "predictor", "streaming")
    }
    assert found["oracle"].relative_recovery == pytest.approx(1.0, abs=1e-5)
    for policy in ("quest", "predictor", "streaming"):
        assert found[policy].relative_recovery < 1.0
    assert found["predictor"].relative_recovery > found["streaming"].relative_recovery


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    crop=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_quest_bounds_every_logit(pieces, crop, seed):
    """No key of a block has a larger product with the query than the block's bound, whatever was cropped."""
    torch.manual_seed(seed)
    keys = torch.randn(B, G, sum(pieces) + 20, D)
    bounds, length = KeyBounds(spec()), 0
    bounds.reserve(64)
    for piece in pieces:
        bounds.extend(keys[:, :, length : length + piece])
        length += piece
    length = max(length - crop, 0)
    bounds.crop(length, lambda start, stop: keys[:, :, start:stop])
    for token in range(length, length + 3):
        bounds.length += 1
        bounds.append(keys[:, :, token], Extent(torch.full((B,), token + 1), None, 64, 16))
    bounds.check_integrity()
    query = torch.randn(B, H, D)
    logits = scaled_logits(query[:, :, None], keys[:, :, : length + 3], Terms(1.0))[:, :, 0]
    peak, _ = block_peak_and_sum(logits, 16)
    true = peak.unflatten(1, (G, -1)).amax(2)
    n_blocks = true.shape[-1]
    assert (bounds.bound(query)[..., :n_blocks] >= true - 1e-4).all()
    bounds.index(torch.tensor([1]))
    assert (bounds.bound(query[1:])[..., :n_blocks] >= true[1:] - 1e-4).all()
    assert (bounds.bound(query[1:])[..., n_blocks:] < true.min()).all()


def test_quest_ahead_selects_what_quest_would_have_a_step_before(tiny_model, ids, monkeypatch):
    queries, selections = [], []
    observe = QuestAhead.observe

    def watched(policy, step):
        queries.append(step.query_BHD)
        observe(policy, step)

    def check(cache):
        (layer,) = cache.layers
        layer.check_integrity()  # which waits for what the next token was promised
        length, table = layer.blocks.length, layer.blocks.table
        quest = policy_class("quest")(layer.policy.spec)
        quest.bounds.extend(layer.blocks.store.read(0, length)[0])
        quest.bounds.reserve(layer.blocks.capacity)
        scores, extent = quest.bounds.bound(queries[-1]), layer.blocks.extent
        wanted_BGC = chosen_blocks(layer.selection.limits(length + 1), extent.next, scores)
        selections.append(table.active_RC(extent.capacity).view_as(wanted_BGC))
        assert torch.equal(selections[-1], wanted_BGC)

    monkeypatch.setattr(QuestAhead, "observe", watched)
    decode(tiny_model(num_hidden_layers=1), ids(300), policy="quest-ahead", each=check)
    assert len(queries) == len(selections) == 12
    assert any(not torch.equal(*pair) for pair in itertools.pairwise(selections))


class TestCalibration:
    @staticmethod
    def rows(tiny_model, ids, monkeypatch, **changes):
        """Rows that the history of layer 0 is told, beside the truth and what was attended."""
        told = []
        observe = PredictorPolicy.observe

        def watched(policy, step):
            exact = step.exact.scores_BGQN[:, :, 0]
            told.append((policy.row(step)[..., : step.blocks], exact, step.attended_BGC[..., : step.blocks]))
            observe(policy, step)

        monkeypatch.setattr(PredictorPolicy, "observe", watched)
        decode(tiny_model(num_hidden_layers=1), ids(300), steps=10, **changes)
        return told

    def test_sketch_is_close_everywhere(self, tiny_model, ids, monkeypatch):
        for row, exact, attended in self.rows(tiny_model, ids, monkeypatch, sketch_bits=8, late_fetch=0.0):
            assert row.shape == exact.shape
            assert (row - exact).abs().max() < 0.02
            assert (row[attended] - exact[attended]).abs().max() < 0.02
            assert (row[~attended] > 0).any()

    def test_exact_comes_at_its_interval(self, tiny_model, ids, monkeypatch):
        told = self.rows(tiny_model, ids, monkeypatch, calibration="exact", calibration_interval=3, late_fetch=0.0)
        for step, (row, exact, attended) in enumerate(told, 1):
            if step % 3 == 0:
                assert torch.equal(row, exact)
            else:
                assert (row[~attended] == 0).all()

    def test_none_knows_only_what_was_attended(self, tiny_model, ids, monkeypatch):
        for row, exact, attended in self.rows(tiny_model, ids, monkeypatch, calibration="none", late_fetch=0.0):
            assert (row[~attended] == 0).all()
            # Normalised over fewer keys than there are, a row is never below the truth.
            assert (row[attended] >= exact[attended] - 1e-6).all()


@pytest.mark.parametrize("share", [0.0, 0.34, 1.0])
def test_late_fetch_is_bounded(tiny_model, ids, share):
    late = [0]
    stats = decode(
        tiny_model(),
        ids(300),
        late_fetch=share,
        steps=10,
        each=lambda cache: late.append(cache.layers[0].runtime.stats.late_blocks),
    )
    rows, allowed = 2 * 2, int(share * 6)
    assert len(late) == 11
    assert all(after - before <= rows * allowed for before, after in itertools.pairwise(late))
    assert (stats.late_blocks > 0) == (share > 0)
    parts = stats.device_kv_parts()
    assert set(parts) >= {"pool", "history", "sketch"}


@pytest.mark.parametrize("policy", ["predictor", "quest", "quest-ahead", "streaming", "oracle"])
def test_a_reserve_never_widens_what_a_step_reads(tiny_model, ids, policy):
    model, prompt, steps = tiny_model(), ids(300), 20
    model.eval()
    without, reserve = (
        decode(model, prompt, steps, policy=policy, reserve=share, late_fetch=0.0) for share in (0.0, 1.0)
    )
    rows = 2 * 2
    assert reserve.wanted_blocks <= steps * rows * 6
    assert reserve.device_kv_parts()["pool"] > without.device_kv_parts()["pool"]
    if policy in ("quest", "oracle"):  # the same choice, of which more is there already
        assert reserve.wanted_blocks == without.wanted_blocks
        assert reserve.fetched_bytes < without.fetched_bytes
    if policy == "predictor":
        assert reserve.late_blocks == 0


def test_what_of_the_reserve_is_fetched_ahead_is_a_setting(tiny_model, ids):
    """All of it fetches most, and none of it only saves fetches; the pool is as large."""
    none, half, everything = (
        decode(tiny_model(), ids(300), policy="predictor", reserve=1.0, reserve_ahead=share, late_fetch=0.0)
        for share in (0.0, 0.5, 1.0)
    )
    assert none.fetched_bytes < half.fetched_bytes < everything.fetched_bytes
    assert none.device_kv_parts() == half.device_kv_parts() == everything.device_kv_parts()
    default = decode(tiny_model(), ids(300), policy="predictor", reserve=1.0, late_fetch=0.0)
    assert default.fetched_bytes == half.fetched_bytes


def test_a_reserve_that_holds_everything_gives_the_best_selection(tiny_model, ids):
    """Nothing is fetched late: all there is to choose from was resident, and known exactly, however poor the sketch."""
    settings = {"policy": "predictor", "late_fetch": 0.0, "sketch_bits": 1, "measure_recovery": 1}
    best = decode(tiny_model(), ids(300), reserve=4.0, **settings)
    worse = decode(tiny_model(), ids(300), reserve=0.0, **settings)
    assert best.relative_recovery > 0.999 > worse.relative_recovery


def test_no_sketch_where_none_is_needed(tiny_model, ids):
    stats = decode(tiny_model(), ids(300), calibration="none", late_fetch=0.0)
    assert "sketch" not in stats.device_kv_parts()


def test_new_tokens_reach_the_policy_once(tiny_model):
    """Also where attention comes back for the keys of one update, as in models whose layers share them."""
    with attach(tiny_model(), OffloadConfig(**SMALL)) as engine:
        layer = engine.new_cache().layers[0]
        for tokens in (100, 30):
            key, value = layer.update(torch.randn(B, G, tokens, D), torch.randn(B, G, tokens, D))
            outputs = [layer.attend(torch.ones(B, H, tokens, D), key, value, Terms(1.0)) for _ in range(2)]
            assert torch.equal(*outputs)
            assert layer.policy.sketch.length == layer.blocks.store.length
        layer.check_integrity()


def test_a_policy_that_scores_nothing_now_says_so():
    class Late(Policy):
        name, selects = "late", "now"

    with pytest.raises(TypeError, match=r"policy 'late' has late_share=1\.0 but does not score now"):
        Late(spec()).score_now(None)
    assert policy_class("streaming")(spec()).score_now(None) is None


@pytest.mark.parametrize("policy", BUILT_IN)
def test_a_copy_made_under_inference_mode_goes_on_outside_of_it(tiny_model, ids, policy):
    model, prompt = tiny_model(), ids(300)
    with attach(model, OffloadConfig(**(SMALL | {"policy": policy}))) as engine:
        with torch.inference_mode():
            cache = engine.new_cache()
            for tokens in (prompt, prompt[:, :1]):
                model(tokens, **with_cache(model, cache))
            twin = copy.deepcopy(cache)
        with torch.no_grad():
            outputs = []
            for one in (cache, twin):
                for tokens in (prompt[:, :1], prompt[:, :7], prompt[:, 1:2]):
                    logits = model(tokens, **with_cache(model, one)).logits
                one.check_integrity()
                outputs.append(logits)
        assert torch.equal(*outputs)
