"""Predictors without weights: baselines for learned ones.

Suffixes: B sequences, G KV heads, R history rows (oldest first), N blocks, C state channels.
"""

from torch import Tensor

from attention_predictor.predictor.base import AttentionPredictor, register
from attention_predictor.predictor.filters import exponential_averages
from attention_predictor.predictor.window import RowWindow


@register
class LastRow(AttentionPredictor):
    """Predicts the last token's scores."""

    arch = "last"
    rows = 1
    channels = 1
    learned = False

    def start(self, rows_BGRN: Tensor) -> Tensor:
        return rows_BGRN[:, :, -1, :, None].to(self.state_dtype, copy=True)

    def observe(self, state_BGNC: Tensor, row_BGN: Tensor) -> Tensor:
        return state_BGNC.copy_(row_BGN[..., None])

    def forward(self, state_BGNC: Tensor, candidate_BN: Tensor | None = None) -> Tensor:
        return state_BGNC[..., 0]


@register
class ExponentialAverage(AttentionPredictor):
    """An exponential average of the score rows, starting at the first one.

    With a decay of 0.9 it recovers as much mass as the published network, so every comparison should include it.
    """

    arch = "ema"
    channels = 1
    learned = False
    decay = 0.9

    def start(self, rows_BGRN: Tensor) -> Tensor:
        rows_BGRN = rows_BGRN[:, :, -self.rows :].to(self.state_dtype)
        decay_F = rows_BGRN.new_tensor([self.decay])
        return exponential_averages(rows_BGRN, decay_F, [rows_BGRN.shape[2] - 1])[:, :, 0]

    def observe(self, state_BGNC: Tensor, row_BGN: Tensor) -> Tensor:
        return state_BGNC.lerp_(row_BGN[..., None].to(state_BGNC.dtype), 1 - self.decay)

    def forward(self, state_BGNC: Tensor, candidate_BN: Tensor | None = None) -> Tensor:
        return state_BGNC[..., 0]


@register
class WindowMean(RowWindow):
    """The mean of the last 64 score rows."""

    arch = "mean"
    learned = False

    def forward(self, state_BGNC: Tensor, candidate_BN: Tensor | None = None) -> Tensor:
        return state_BGNC.float().mean(dim=-1)
