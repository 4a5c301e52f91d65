"""What an analysis measures is what the definitions say, on models of many families."""

from __future__ import annotations

import importlib
import math
import random
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
import transformers
from histories import predicted
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import eager_mask

from attention_predictor.documents import Excerpt
from attention_predictor.eval.analysis import observed_attention as watch
from attention_predictor.eval.analysis.correlation import rank_correlation
from attention_predictor.eval.analysis.document import AnalysisSettings, analyse
from attention_predictor.eval.analysis.layer_map import LayerMap
from attention_predictor.eval.analysis.observed_attention import Attended, watching
from attention_predictor.eval.analysis.predictability import Predictability
from attention_predictor.eval.analysis.rope import Rotation
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.scores import block_mass, block_scores

CONFIG = OffloadConfig(policy="full", prefetch="none", budget=208)
SELECTION = Selection.of(CONFIG)
PROMPT, TAIL, WINDOW = 400, 24, 10


def excerpt(tails: int = 1) -> Excerpt:
    rng = random.Random(5)
    prompt = [rng.randrange(2, 96) for _ in range(PROMPT)]
    return Excerpt(prompt, [[rng.randrange(2, 96) for _ in range(TAIL)] for _ in range(tails)])


def analysed(model: PreTrainedModel, given: Excerpt) -> dict:
    predictors = {
        name: AttentionPredictor.from_pretrained(what) for name, what in (("predictor", "default"), ("last",) * 2)
    }
    with attach(model, CONFIG) as engine:
        return analyse(engine, given, AnalysisSettings(predictors, SELECTION, WINDOW))


@torch.no_grad()
def seen(model: PreTrainedModel, given: Excerpt) -> dict[int, list[Attended]]:
    """Every attention over an offloaded layer: of the prompt, then of the tails."""
    found: dict[int, list[Attended]] = {}
    with attach(model, CONFIG) as engine:
        cache = engine.new_cache()
        with watching(model, cache, lambda attended: found.setdefault(attended.number, []).append(attended)):
            model(torch.tensor([given.prompt]), **with_cache(model, cache))
            cache.batch_repeat_interleave(len(given.tails))
            model(torch.tensor(given.tails), **with_cache(model, cache))
    return found


@torch.no_grad()
def projected(model: PreTrainedModel, ids_BT: Tensor, layer: int) -> Tensor:
    """A layer's queries as the stock model projects (and normalises) them, ``[B, H, T, D]``, before any rotation."""
    kept: list[Tensor] = []
    attention = model.model.layers[layer].self_attn
    source = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None)
    hook = (source or attention.qkv_proj).register_forward_hook(lambda module, args, out: kept.append(out))
    model(ids_BT)
    hook.remove()
    heads, D = model.config.num_attention_heads, attention.head_dim
    (out,) = kept
    if out.dim() == 4:  # normalised head by head: [B, T, H, D], or with heads in front
        return out if out.shape[1] == heads else out.transpose(1, 2)
    return out[..., : heads * D].unflatten(-1, (heads, D)).transpose(1, 2)


def similarity(query_TD: Tensor) -> float:
    """By the definition: mean cosine over all pairs of different queries."""
    cosines = [torch.cosine_similarity(one, other, dim=0).item() for one, other in combinations(query_TD.double(), 2)]
    return sum(cosines) / len(cosines)


class TestQuerySimilarity:
    @pytest.mark.parametrize("family", ["llama-mha", "llama", "qwen2", "qwen3", "gemma3", "phi3", "olmo2"])
    def test_is_the_definition(self, family):
        model, given = make_tiny_model(family), excerpt()
        rows = analysed(model, given)["rows"]
        ids_BT = torch.tensor([given.prompt + given.tails[0]])
        for row in rows:
            query_TD = projected(model, ids_BT, row["layer"])[0, row["head"]]
            at_end = similarity(query_TD[PROMPT - WINDOW : PROMPT])
            assert row["qsim_prompt_plain"] == pytest.approx(at_end, abs=1e-6)
            steps = query_TD[PROMPT:].split(WINDOW)
            assert [len(one) for one in steps] == [10, 10, 4]  # the last one is less than half of a window
            assert row["qsim_steps_plain"] == pytest.approx((similarity(steps[0]) + similarity(steps[1])) / 2, abs=1e-6)
        offloaded = 1 if family == "gemma3" else 2
        assert len(rows) == offloaded * model.config.num_attention_heads

    @pytest.mark.parametrize("family", ["llama-mha", "llama", "qwen3", "glm", "gpt-oss"])
    def test_after_rotation_is_of_the_queries_that_attention_takes(self, family):
        model, given = make_tiny_model(family), excerpt()
        taken: dict[int, Tensor] = {}

        def note(module, query, key, value, mask, **kwargs):
            taken[module.layer_idx] = query
            eager = importlib.import_module(type(module).__module__).eager_attention_forward
            return eager(module, query, key, value, mask, **kwargs)

        transformers.AttentionInterface.register("note-queries", note)
        transformers.AttentionMaskInterface.register("note-queries", eager_mask)
        rows = analysed(model, given)["rows"]
        model.set_attn_implementation("note-queries")
        with torch.no_grad():
            model(torch.tensor([given.prompt + given.tails[0]]))
        for row in rows:
            query_TD = taken[row["layer"]][0, row["head"]]
            assert row["qsim_prompt"] == pytest.approx(similarity(query_TD[PROMPT - WINDOW : PROMPT]), abs=1e-6)


class TestRotation:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt-oss", "glm", "phi", "olmo2", "cohere2"])
    def test_is_undone(self, family):
        model, given = make_tiny_model(family), excerpt()
        number, (prompt, steps) = next(iter(seen(model, given).items()))
        if family == "cohere2":  # only its sliding layers are rotated, and they are none of ours
            assert (number, prompt.rotation) == (1, None)
            return
        ids_BT = torch.tensor([given.prompt + given.tails[0]])
        if family == "phi":
            expected = projected_phi(model, ids_BT, number)
        else:
            expected = projected(model, ids_BT, number)
        for attended, part in ((prompt, slice(0, PROMPT)), (steps, slice(PROMPT, None))):
            assert attended.plain_BHQD is not None
            assert torch.allclose(attended.plain_BHQD, expected[:, :, part], atol=1e-5)
            assert not torch.allclose(attended.query_BHQD, expected[:, :, part], atol=1e-2)

    def test_layers_without_one_have_none(self):
        found = seen(make_tiny_model("smollm3"), excerpt())
        assert found[0][0].rotation is not None
        assert found[1][0].rotation is None
        rows = analysed(make_tiny_model("smollm3"), excerpt())["rows"]
        assert all(row["qsim_prompt_plain"] is None and row["channels"] is None for row in rows if row["layer"] == 1)
        assert all(row["qsim_prompt_plain"] is not None for row in rows if row["layer"] == 0)

    @pytest.mark.parametrize(("family", "pairs"), [("llama", 4), ("glm", 2), ("phi", 2)])
    def test_wavelengths(self, family, pairs):
        model = make_tiny_model(family)
        rotation = seen(model, excerpt())[0][1].rotation
        assert rotation is not None
        expected = (math.tau / model.model.rotary_emb.inv_freq.double()).tolist()
        assert len(expected) == pairs
        assert sorted(rotation.wavelengths) == pytest.approx(sorted(expected), rel=1e-3)

    def test_pairs_turn_together(self):
        """A pair's part of a product depends on the distance alone; interleaved channels have other partners."""
        for family, partners in (("llama", [4, 5, 6, 7, 0, 1, 2, 3]), ("glm", [1, 0, 3, 2, 4, 5, 6, 7])):
            rotation = seen(make_tiny_model(family), excerpt())[0][0].rotation
            assert rotation is not None
            assert rotation.partner_D.tolist() == partners
            x_D, y_D = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))

            def turned(x_D: Tensor, at: int, rotation: Rotation = rotation) -> Tensor:
                return rotation.cos_QD[at] * x_D + rotation.sin_QD[at] * x_D[rotation.partner_D]

            products = torch.stack([turned(x_D, at) * turned(y_D, at + 7) for at in (3, 90)])
            by_pair = rotation.by_pair(products[:, None])
            assert torch.allclose(by_pair[0], by_pair[1], atol=1e-4)
            assert torch.allclose(by_pair.sum(-1)[:, 0], products.sum(-1), atol=1e-5)


def projected_phi(model: PreTrainedModel, ids_BT: Tensor, layer: int) -> Tensor:
    """Phi may have norms on queries that it does not use."""
    kept: list[Tensor] = []
    attention = model.model.layers[layer].self_attn
    hook = attention.q_proj.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model(ids_BT)
    hook.remove()
    return kept[0].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


class TestLayerMap:
    @pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3", "gemma2", "gpt-oss"])
    @torch.no_grad()
    def test_rows_are_the_stock_models(self, family):
        model, given = make_tiny_model(family), excerpt()
        ids_BT = torch.tensor([given.prompt + given.tails[0]])
        stock = model(ids_BT, output_attentions=True).attentions
        for number, (_, steps) in seen(model, given).items():
            expected_BHQT = stock[number][:, :, PROMPT:, : ids_BT.shape[1]]
            found = LayerMap(steps, SELECTION)
            heads = expected_BHQT.shape[1]
            assert torch.allclose(found.rows.mass_BGQN, block_mass(expected_BHQT, heads, 16), atol=1e-5)
            assert torch.allclose(found.rows.scores_BGQN, block_scores(expected_BHQT, heads, 16), atol=1e-5)

    @torch.no_grad()
    def test_channels_make_up_the_difference_in_logits(self):
        """Summed over pairs: the mean logit by attention, less the mean logit, over what is judged."""
        (_, steps) = seen(make_tiny_model("llama"), excerpt())[1]
        found = LayerMap(steps, SELECTION)
        assert found.channels_BHP is not None
        key_BGTD = steps.layer.blocks.store.read(0, steps.length)[0]
        logits_BHQT = (steps.query_BHQD @ key_BGTD.repeat_interleave(2, 1).transpose(-1, -2)) * steps.terms.scaling
        prob_BHQT = found.part.cut(0, steps.probabilities(0, key_BGTD, found.total_BHQ1))
        first, end = found.part.first_token, int(found.part.end_Q[-1])
        assert bool(found.part.far_BH.all())
        usual_BHQ1 = logits_BHQT[..., first:end].mean(-1, keepdim=True)
        mass_BH = prob_BHQT.sum((-2, -1))
        expected_BH = (prob_BHQT * (logits_BHQT - usual_BHQ1)).sum((-2, -1)) / mass_BH
        assert torch.allclose(found.channels_BHP.sum(-1), expected_BH, atol=1e-4)

    def test_small_chunks_make_no_difference(self, monkeypatch):
        before = analysed(make_tiny_model(), excerpt(2))
        monkeypatch.setattr(watch, "LOGITS_BYTES", 1)
        monkeypatch.setattr(watch, "LEAST_TOKENS", 48)
        for one, other in zip(before["rows"], analysed(make_tiny_model(), excerpt(2))["rows"], strict=True):
            assert one["pattern"] == other["pattern"]
            for name, value in one.items():
                if isinstance(value, float):
                    assert value == pytest.approx(other[name], abs=1e-4), name
            assert one["channels"] == pytest.approx(other["channels"], abs=1e-4)

    def test_tails_are_judged_by_themselves(self):
        given = excerpt(3)
        together = analysed(make_tiny_model(), given)["rows"]
        for number, tail in enumerate(given.tails):
            alone = analysed(make_tiny_model(), Excerpt(given.prompt, [tail]))["rows"]
            same = [row for row in together if row["sequence"] == number]
            for one, other in zip(same, alone, strict=True):
                assert one["predictor_relative"] == pytest.approx(other["predictor_relative"], abs=1e-4)
                assert one["vertical"] == pytest.approx(other["vertical"], abs=1e-4)
                assert one["qsim_steps"] == pytest.approx(other["qsim_steps"], abs=1e-5)


def test_watching_changes_nothing():
    model, given = make_tiny_model("qwen3"), excerpt()
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    with attach(model, CONFIG) as engine, torch.no_grad():
        logits = []
        for see in (None, lambda attended: None):
            cache = engine.new_cache()
            if see is None:
                logits.append(model(torch.tensor([given.prompt]), **with_cache(model, cache)).logits)
                continue
            with pytest.raises(KeyError), watching(model, cache, see):
                logits.append(model(torch.tensor([given.prompt]), **with_cache(model, cache)).logits)
                raise KeyError("an error on the way")
            assert all("attend" not in layer.__dict__ for layer in cache.layers)
            assert torch.equal(*logits)
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()) == hooks


class TestForesight:
    @staticmethod
    def rows(steps: int, length: int, seed: int = 0) -> tuple[Tensor, ScoreRows]:
        """Prompt rows, then rows of steps; blocks beyond a step's length are zero."""
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-length // 16)
        mass = torch.rand(2, 3, 64 + steps, blocks, generator=generator) ** 6
        for step in range(64 + steps):
            mass[:, :, step, -(-(length - steps - 63 + step) // 16) :] = 0
        mass = mass / mass.sum(-1, keepdim=True)
        prompt_blocks = -(-(length - steps) // 16)
        return mass[:, :, :64, :prompt_blocks], ScoreRows(mass[:, :, 64:] * 0.7, mass[:, :, 64:])

    @pytest.mark.parametrize("predictor", ["default", "last", "ema"])
    @torch.no_grad()
    def test_chooses_as_the_engine_does(self, predictor):
        """Step by step, as a policy that attends to everything would."""
        steps, length, one = 40, 700, AttentionPredictor.from_pretrained(predictor)
        prompt_BGRN, rows = self.rows(steps, length)
        found = Predictability(one, prompt_BGRN).over(rows, length, SELECTION)
        history = ScoreHistory(one, batch=2, kv_heads=3, device="cpu")
        history.start(prompt_BGRN)
        shares, relatives, far_got, far_most = [], [], 0.0, 0.0
        for step in range(steps):
            tokens = length - steps + step + 1
            blocks = SELECTION.n_blocks(tokens)
            first, last = SELECTION.candidates(tokens)
            scores_BGN = predicted(history, first, min(last, history.n_blocks))
            truth_BGN = rows.mass_BGQN[:, :, step, :blocks]
            extent = Extent(torch.full((2,), tokens), None, blocks, SELECTION.block_size)
            scores_BGN = F.pad(scores_BGN, (0, blocks - scores_BGN.shape[-1]), value=-torch.inf)
            got, most = (
                chosen_blocks(SELECTION.limits(tokens), extent, x) * truth_BGN for x in (scores_BGN, truth_BGN)
            )
            shares.append(got.sum(-1) / truth_BGN.sum(-1))
            relatives.append(got.sum(-1) / most.sum(-1))
            far_got, far_most = far_got + got[..., first:last].sum(-1), far_most + most[..., first:last].sum(-1)
            history.push(rows.scores_BGQN[:, :, step, :blocks])
        assert torch.allclose(found.share_BG, torch.stack(shares).mean(0), atol=1e-6)
        assert torch.allclose(found.relative_BG, torch.stack(relatives).mean(0), atol=1e-6)
        assert torch.allclose(found.far_BG, far_got / far_most, atol=1e-6)
        assert found.relative_BG.max() < 1
        assert int(found.chosen_BGQN.sum(-1).unique()) == SELECTION.budget // 16

    def test_what_stays_is_foreseen_by_the_last_row(self):
        rows = self.rows(1, 700)[1]
        still = ScoreRows(*(x.expand(2, 3, 10, 44) for x in rows))  # 700 tokens and 10 less have 44 blocks
        same = rows.scores_BGQN[..., :44].clone()
        found = Predictability(AttentionPredictor.from_pretrained("last"), same).over(still, 702, SELECTION)
        assert torch.allclose(found.relative_BG, torch.ones(2, 3))
        assert torch.allclose(found.far_BG, torch.ones(2, 3))
        assert torch.equal(found.chosen_BGQN, found.best_BGQN)

    def test_nothing_far_is_not_a_number(self):
        prompt_BGRN, rows = self.rows(4, 700)
        mass = torch.zeros_like(rows.mass_BGQN)
        mass[..., 0] = 1.0
        found = Predictability(AttentionPredictor.from_pretrained("last"), prompt_BGRN).over(
            ScoreRows(mass, mass), 700, SELECTION
        )
        assert found.far_BG.isnan().all()
        assert torch.allclose(found.relative_BG, torch.ones(2, 3))


class TestCorrelation:
    def test_order_alone_counts(self):
        pairs = [(x, math.exp(5 * x)) for x in (0.3, 0.9, 0.1, 0.5, 0.7)]
        assert rank_correlation(pairs, 0).rho == pytest.approx(1)
        assert rank_correlation([(x, -y) for x, y in pairs], 0).rho == pytest.approx(-1)

    def test_by_hand(self):
        # Ranks 0 1 2 3 4 against 1 0 2 4 3: 1 - 6 * 4 / (5 * 24)
        assert rank_correlation(list(zip((1, 2, 3, 4, 5), (20, 10, 30, 50, 40), strict=True)), 0).rho == pytest.approx(
            0.8
        )
        # Equal values share a rank: 0.5 0.5 2 3 against 0 1 2 3
        tied = rank_correlation([(1, 10), (1, 20), (2, 30), (3, 40)], 0).rho
        assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))

    def test_the_interval_holds_it_and_shrinks(self):
        rng = random.Random(0)
        widths = []
        for count in (20, 200):
            pairs = [(x, x + rng.gauss(0, 1)) for x in (rng.gauss(0, 1) for _ in range(count))]
            found = rank_correlation(pairs, 0)
            low, high = found.interval
            assert low < found.rho < high
            assert found == rank_correlation(pairs, 0)
            widths.append(high - low)
        assert widths[1] < widths[0] / 2

    def test_unknown_ones_are_left_out(self):
        assert rank_correlation([(1, 1), (2, 2), (None, 5), (3, 3), (4, None)], 0).pairs == 3
        assert rank_correlation([(1, 5), (2, 5), (3, 5)], 0).rho is None
        assert rank_correlation([(1, 5)], 0).rho is None
