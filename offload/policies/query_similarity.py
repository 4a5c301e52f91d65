"""Query similarity: the mean cosine between a head's queries over a window of tokens.

TAPPA (ICLR 2026, arXiv 2601.21709): if a head's queries hardly change from token to token, its attention stays the same
and can be predicted; if they change, it can't.

Suffixes: B sequences, H query heads, T tokens of the window, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 32  # last prompt queries that the paper looks at


def query_similarity(query_BHTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Mean cosine of all pairs of different queries of the window, fp32 ``[B, H]``, from -1/(T - 1) to 1.

    Args:
        query_BHTD: Queries as attention uses them (normalised and rotated, if the model does so), of any dtype. A query
            of zeros has a cosine of 0 with all others.
        real_BT: bool, False at padding, whose queries are left out; ``None`` where there is none.

    Returns:
        NaN where a sequence has fewer than two queries: there is no pair.
    """
    unit_BHTD = F.normalize(query_BHTD.float(), dim=-1)
    B, _, T, _ = query_BHTD.shape
    count_B = torch.full((B,), T, device=query_BHTD.device)
    if real_BT is not None:
        unit_BHTD = unit_BHTD * real_BT[:, None, :, None]
        count_B = real_BT.sum(-1)
    # The square of the sum holds every pair twice, and each query with itself: no T × T matrix is needed.
    sum_BH = unit_BHTD.sum(2).square().sum(-1) - unit_BHTD.square().sum((2, 3))
    return sum_BH / (count_B * (count_B - 1))[:, None]
