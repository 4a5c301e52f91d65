"""Recording: rows as sparse decoding leaves them, beside the truth, against rows of full attention."""

from __future__ import annotations

import pytest
import torch

from attention_predictor import OffloadConfig
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.predictor.errors import DataError
from attention_predictor.train.record import FullRecorder, SparseRecorder, check_space, largest_size, record

STEPS = PROMPT_ROWS + 20


def recorded(model, ids, policy, **settings):
    config = OffloadConfig(policy=policy.name, predictor="ema", prefetch="none", **settings)
    return list(record(model, ids, STEPS, config))


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


def test_a_recording_that_does_not_fit_the_disk_is_refused(tiny_model, tmp_path, capsys):
    # 2 layers of 2 KV heads, 100 steps over 1,000 tokens: scores and mass of 63 blocks, 2 bytes each.
    needed = largest_size(tiny_model("llama"), documents=10, max_tokens=1000, steps=100, block_size=16)
    assert needed == 10 * 2 * 2 * 100 * 63 * 4
    check_space(tmp_path / "not" / "there yet", needed)
    assert "at most 0.00 GiB" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"may take 1048576.0 GiB, .* are free"):
        check_space(tmp_path, 2**50)
