"""The default predictor: learned exponential averages of past scores, instead of a window of rows.

Suffixes: B sequences, G KV heads, X = B × G, R history rows (oldest first), S chosen rows among them, N
blocks, C state channels, H hidden channels, F filters, P peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attention_predictor.csrc import ops
from attention_predictor.csrc.observe import FILTERS
from attention_predictor.csrc.predict import CHANNELS, FURTHER, HIDDEN
from attention_predictor.predictor.base import AttentionPredictor, register

CHUNK_ROWS = 16  # rows weighted at once: a larger number means more work for many steps, but fewer operations


def exponential_averages(x_RN: Tensor, decay_F: Tensor, steps: list[int]) -> Tensor:
    """Averages y ← decay·y + (1 − decay)·row of `x_RN` [..., R, N] after `steps` (ascending): [..., S, N, F].

    The averages start at row 0, as if it had always held. Starting from zero would take long memories hundreds of steps
    to correct. Computed in closed form, CHUNK_ROWS rows at a time; differentiable with respect to rows and decays.
    """
    average_NF = x_RN[..., 0, :, None]
    averages, begin = [], 0
    while begin <= steps[-1]:
        end = max(steps[0] + 1, begin + CHUNK_ROWS) if begin == 0 else begin + CHUNK_ROWS
        end = min(end, steps[-1] + 1)
        inside = [step - begin for step in steps if begin <= step < end]
        wanted_S = torch.tensor([*inside, end - begin - 1], device=decay_F.device)
        age_SR = wanted_S[:, None] - torch.arange(end - begin, device=decay_F.device)
        weight_SRF = torch.where(age_SR[..., None] >= 0, decay_F ** age_SR[..., None].clamp(min=0), 0.0)
        recent_SNF = torch.einsum("...rn,srf->...snf", x_RN[..., begin:end, :], weight_SRF * (1 - decay_F))
        before_S1F = (decay_F ** (wanted_S[:, None] + 1))[:, None]
        average_SNF = recent_SNF + before_S1F * average_NF[..., None, :, :]
        averages.append(average_SNF[..., :-1, :, :])
        average_NF = average_SNF[..., -1, :, :]
        begin = end
    return torch.cat(averages, dim=-3)


def held_peaks(x_RN: Tensor, drop_P: Tensor, steps: list[int]) -> Tensor:
    """Peaks y ← max(y − drop, row of `x_RN` [..., R, N] ≥ 0) after `steps` (ascending): [..., S, N, P].

    In closed form: a peak's value after step s is max over r ≤ s of (row r + drop·r) − drop·s.
    """
    step_R = torch.arange(steps[-1] + 1, dtype=x_RN.dtype, device=x_RN.device)
    peaks = []
    for drop in drop_P.unbind():
        lifted_RN = x_RN[..., : steps[-1] + 1, :] + drop * step_R[:, None]
        held_RN = lifted_RN.cummax(dim=-2).values - drop * step_R[:, None]
        peaks.append(held_RN[..., steps, :])
    return torch.stack(peaks, dim=-1)


@dataclass(frozen=True)
class PackedFilters:
    """A FilterPredictor's weights in the kernels' layout (`csrc/observe.py`, `csrc/predict.py`).

    Attributes:
        fold_C: Weight of the new score in each average; the fall of each peak per step (infinite for the last score).
        eps: Of the logarithmic scale.
        weight, bias: Of the convolutions, from `pack_convolutions`.
    """

    fold_C: Tensor
    eps: float
    weight: Tensor
    bias: Tensor


@register
class FilterPredictor(AttentionPredictor):
    """Filters over time, then small convolutions over blocks. Better than the published network, and without a window.

    Ours, in place of the network of AttentionPredictor (arXiv 2502.04077, section 4). Attention is heavy-tailed, so 8
    exponential averages with learned decays run over its logarithm. An average forgets a block that got much attention
    only once. But a head may return to it tokens later, to answer with what it found at the question. So 5 peaks of the
    logarithm are kept, each falling linearly, from top to bottom in about 10 to 170 steps. With the last row that makes
    14 channels per block; more channels, or other kinds, were no better (docs/LOG.md). Attention to one block often
    moves on to the next ones, as a statement continues; three residual convolutions spread it over up to 4 blocks. A
    step costs about 30 operations per block to observe and 10,600 multiply-adds to predict, against 300,000 for the
    published network.

    Its scores are logits: softmax over the candidates estimates each block's share of their attention mass.
    """

    arch = "time-filters"
    gives_logits = True
    filters = 8
    hidden = 32
    further = 3
    drops = (0.1, 0.05, 0.025, 0.012, 0.006)  # fall per step, on the log scale from 0 to 1
    channels = filters + 1 + len(drops)  # averages of log scores, the last log scores, peaks
    eps: Tensor
    drop: Tensor

    def __init__(self, *, block_size: int = 16):
        super().__init__(block_size=block_size)
        half_life_F = 0.5 * 2 ** torch.linspace(0, 8, self.filters)  # 0.5 to 128 steps
        self.logit_decay = nn.Parameter(torch.logit(0.5 ** (1 / half_life_F)))
        self.conv1 = nn.Conv1d(self.channels, self.hidden, 3, padding=1)
        self.spread = nn.ModuleList(nn.Conv1d(self.hidden, self.hidden, 3, padding=1) for _ in range(self.further))
        self.conv2 = nn.Conv1d(self.hidden, 1, 1)
        self.register_buffer("eps", torch.tensor(1e-5))  # scores below it count as equal; saved with the weights
        self.register_buffer("drop", torch.tensor(self.drops))
        self._packed: tuple[list[tuple[int, int]], PackedFilters] | None = None

    def why_no_kernel(self) -> str | None:
        """Why the kernels don't compute this predictor; `None` if they do."""
        found = (self.filters, self.channels, self.hidden, self.further)
        expected = (FILTERS, CHANNELS, HIDDEN, FURTHER)
        if found == expected:
            return None
        return "no kernel for {} filters, {} channels, {} hidden ones and {} further convolutions".format(*found)

    @torch.inference_mode(False)
    @torch.no_grad()
    def packed(self) -> PackedFilters:
        """The weights in the kernels' layout, cached until a parameter changes or moves.

        Building it reads a number back from the device, so it must not happen while a CUDA graph is captured.
        """
        tensors = (*self.parameters(), *self.buffers())
        found = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if self._packed is None or self._packed[0] != found:
            weight_F, last_1 = 1 - self.logit_decay.sigmoid(), self.drop.new_full((1,), torch.inf)
            weight, bias = ops.pack_convolutions([self.conv1, *self.spread], self.conv2)
            fold_C = torch.cat([weight_F, last_1, self.drop]).float()
            self._packed = (found, PackedFilters(fold_C, float(self.eps), weight, bias))
        return self._packed[1]

    def log_scale(self, scores: Tensor) -> Tensor:
        """Map [0, 1] to [0, 1] logarithmically; zero stays zero, so a new block starts as zeros."""
        return torch.log1p(scores.float() / self.eps) / torch.log1p(1 / self.eps)

    def start(self, rows_BGRN: Tensor) -> Tensor:
        """As `AttentionPredictor.start`; averages start at the first of these rows."""
        rows_BGRN = rows_BGRN[:, :, -self.rows :]
        return self._states(rows_BGRN, [rows_BGRN.shape[2] - 1])[:, :, 0]

    def observe(self, state_BGNC: Tensor, row_BGN: Tensor) -> Tensor:
        log_BGN1 = self.log_scale(row_BGN)[..., None]
        state_BGNC[..., : self.filters].lerp_(log_BGN1, 1 - self.logit_decay.sigmoid())
        state_BGNC[..., self.filters : self.filters + 1] = log_BGN1
        peak_BGNP = state_BGNC[..., self.filters + 1 :]
        peak_BGNP.copy_(torch.maximum(peak_BGNP - self.drop, log_BGN1))
        return state_BGNC

    def unroll(self, rows_BGRN: Tensor, steps_S: Tensor) -> Tensor:
        """As `AttentionPredictor.unroll`, in closed form and differentiable with respect to the decays."""
        return self._states(rows_BGRN, steps_S.tolist())

    def _states(self, rows_BGRN: Tensor, steps: list[int]) -> Tensor:
        log_BGRN = self.log_scale(rows_BGRN)
        average_BGSNF = exponential_averages(log_BGRN, self.logit_decay.sigmoid(), steps)
        last_BGSN1 = log_BGRN[:, :, steps, :, None]
        return torch.cat([average_BGSNF, last_BGSN1, held_peaks(log_BGRN, self.drop, steps)], dim=-1)

    def forward(self, state_BGNC: Tensor, candidate_BN: Tensor | None = None) -> Tensor:
        batch, kv_heads, n_blocks, channels = state_BGNC.shape
        state_XCN = state_BGNC.reshape(-1, n_blocks, channels).transpose(1, 2)
        # Blocks beside the candidates count as zeros, like the padding of a convolution at the ends.
        mask_X1N: Tensor | float = 1.0
        if candidate_BN is not None:
            mask_X1N = candidate_BN.repeat_interleave(kv_heads, 0)[:, None].to(state_XCN.dtype)
        hidden_XHN = self.conv1(state_XCN * mask_X1N).relu() * mask_X1N
        for convolution in self.spread:
            hidden_XHN = hidden_XHN + convolution(hidden_XHN).relu() * mask_X1N
        return self.conv2(hidden_XHN).view(batch, kv_heads, n_blocks)
