"""TAPPA (ICLR 2026, arXiv 2601.21709): larger budgets for layers whose queries vary more.

As in the paper: layers share the total budget by 1 − q, q being the similarity of a layer's last 32 prompt queries
(``policies/allocation.py``, ``qsim``). Within a layer tokens are ranked by the mean of those queries' attention and γ
times its variance, smoothed by an average of width 5: the indicator of CAKE, on which the authors built, and its γ.

Adapted: as CAKE is here. The paper's other preference, CAKE's plus α (1 − q), is left out: its α is tuned by model.
"""

from __future__ import annotations

from attention_predictor.offload.policies.cake import CAKE


class TAPPA(CAKE):
    """CAKE's indicator; budgets by the similarity of a layer's queries."""

    name = "tappa"
    allocation = "qsim"
