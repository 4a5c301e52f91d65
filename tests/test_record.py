"""Recording: rows as sparse decoding leaves them, beside the truth, against rows of full attention."""

from __future__ import annotations

import pytest
import torch

from attention_predictor import OffloadConfig
from attention_predictor.documents import Excerpt
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.predictor.errors import DataError
from attention_predictor.train.estimate import check_space, in_words, largest_size, seconds_a_document
from attention_predictor.train.recorder import FullRecorder, SparseRecorder, record

TAIL = 20
STEPS = PROMPT_ROWS + TAIL


def recorded(model, tokens, policy, *others, **settings):
    """Records of the tokens, the last 20 being the tail; of other tails of that length behind them as well."""
    config = OffloadConfig(policy=policy.name, predictor="ema", prefetch="none", **settings)
    return list(record(model, Excerpt(tokens[:-TAIL], [tokens[-TAIL:], *others]), config))


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "gemma2"])
def test_sparse_rows_of_a_budget_that_covers_all_are_full_rows(tiny_model, ids, family):
    model, tokens = tiny_model(family), ids(300)[0].tolist()
    full = recorded(model, tokens, FullRecorder, history=STEPS)
    sparse = recorded(model, tokens, SparseRecorder, late_fetch=0.0)
    assert len(full) == len(sparse) > 0
    for one, other in zip(full, sparse, strict=True):
        assert (one.layer, one.head, one.first_tokens) == (other.layer, other.head, other.first_tokens)
        assert one.scores_QN.shape == other.scores_QN.shape == (STEPS, -(-300 // 16))
        assert (one.scores_QN - other.scores_QN).abs().max() < 1e-4
        assert (one.mass_QN - other.mass_QN).abs().max() < 1e-4


def test_sparse_rows_are_what_the_history_was_told(tiny_model, ids):
    model, tokens = tiny_model("llama"), ids(400)[0].tolist()
    settings = {"budget": 64, "sink": 16, "recent": 16, "late_fetch": 0.0}
    full = recorded(model, tokens, FullRecorder, history=STEPS)
    sparse = recorded(model, tokens, SparseRecorder, **settings)
    blind = recorded(model, tokens, SparseRecorder, calibration="none", **settings)
    for one, other, third in zip(full, sparse, blind, strict=True):
        # The prompt is attended in full; after it blocks outside the budget are estimated, or unknown.
        assert (one.scores_QN - other.scores_QN)[:PROMPT_ROWS].abs().max() < 1e-5
        assert not torch.equal(one.scores_QN, other.scores_QN)
        assert (other.scores_QN[PROMPT_ROWS:, :-1] > 0).all()
        assert (third.scores_QN[PROMPT_ROWS:] > 0).sum(-1).max() <= 64 // 16
        # The mass is the truth for the queries that sparse decoding really had, over all keys.
        assert other.mass_QN.sum(-1).allclose(torch.ones(STEPS), atol=1e-4)


@pytest.mark.parametrize("policy", [FullRecorder, SparseRecorder])
def test_tails_of_one_prompt_are_recorded_as_each_by_itself(tiny_model, ids, policy):
    model, tokens = tiny_model("llama"), ids(400)[0].tolist()
    tails = [ids(TAIL, seed=seed)[0].tolist() for seed in (1, 2)]
    settings = {"budget": 64, "sink": 16, "recent": 16, "late_fetch": 0.0}
    together = recorded(model, tokens, policy, *tails, **settings)
    alone = [recorded(model, tokens[:-TAIL] + tail, policy, **settings) for tail in (tokens[-TAIL:], *tails)]
    for one in together:
        other = next(each for each in alone[one.sequence] if (each.layer, each.head) == (one.layer, one.head))
        assert (one.scores_QN - other.scores_QN).abs().max() < 1e-5
        assert (one.mass_QN - other.mass_QN).abs().max() < 1e-5
    assert len({(one.sequence, one.layer, one.head) for one in together}) == len(together) == 3 * len(alone[0])


def test_an_estimate_of_time(tiny_model):
    config = OffloadConfig(policy=SparseRecorder.name, predictor="ema", prefetch="none", late_fetch=0.0)
    like = [Excerpt([0] * 2000, [[0] * 5] * 2), Excerpt([0] * 1000, [[0] * 9])]
    assert 0 < seconds_a_document(tiny_model("llama"), like, config) < 60
    assert (in_words(20), in_words(3600), in_words(9000)) == ("about 1 min", "about 60 min", "about 2.5 h")


def test_a_recording_that_does_not_fit_the_disk_is_refused(tiny_model, tmp_path):
    # 2 layers of 2 KV heads, 100 steps over 1,000 tokens: scores and mass of 63 blocks, 2 bytes each.
    needed = largest_size(tiny_model("llama"), sequences=10, max_tokens=1000, steps=100, block_size=16)
    assert needed == 10 * 2 * 2 * 100 * 63 * 4
    assert "at most 0.00 GiB" in check_space(tmp_path / "not" / "there yet", needed)
    with pytest.raises(DataError, match=r"may take 1048576.0 GiB, .* are free"):
        check_space(tmp_path, 2**50)
