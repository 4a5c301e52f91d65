"""What tests of histories share."""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.predictor.history import ScoreHistory


def predicted(history: ScoreHistory, first: int, last: int) -> Tensor:
    """Scores of blocks ``first`` to ``last - 1`` as the only candidates, of all blocks that the history knows."""
    state_BGNC = history.state_BGNC
    length_B = torch.full((len(state_BGNC),), last * history.predictor.block_size, device=state_BGNC.device)
    return history.predict_ahead(first, 1, length_B, None, history.n_blocks)
