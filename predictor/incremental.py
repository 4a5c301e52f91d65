"""The published network, evaluated incrementally: the same scores as over the whole window, for a tenth of the work.

One step moves the window by one row. A row of the second convolution depends on 5 rows of the window. So when the
window slides, all rows of features but the two at each zero-padded end only move up by one. Their sum over rows is
kept: a step adds the row that enters this interior, subtracts the one that leaves it, and computes the four rows at the
ends. That is 6 rows of features instead of 64. (The network is AttentionPredictor's, arXiv 2502.04077, section 4; the
incremental evaluation is ours.)

State: the window (64 fp16 numbers per block) and the sums (32 fp64 numbers, so that rounding errors do not accumulate).
Work: 2 × 5,328 multiply-adds per block and step to push, 2 × 9,824 to predict, against 304,160 over the window.

Suffixes: B sequences, G KV heads, X = B × G, R window rows (oldest first), N blocks, C feature maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_predictor.arithmetic import scatter_or_drop
from attention_predictor.csrc import binding, ops
from attention_predictor.csrc.window import FEATURES, MAPS, ROWS
from attention_predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor.history import ScoreHistory, candidates_of
from attention_predictor.predictor.sequences import put_sequence
from attention_predictor.predictor.window import WindowPredictor

REACH = 2  # rows or columns to each side that two 3 × 3 convolutions read
STENCIL = 2 * REACH + 1
TILE_COLUMNS = 1 << 14  # columns × X convolved at once, so that feature maps fit in a CPU's cache


@dataclass(frozen=True)
class RowBand:
    """Both convolutions for a few rows of features, as 1-d convolutions over blocks with rows × maps as channels.

    A 2-d convolution over so few rows would spend its time rearranging data.
    """

    rows: slice  # the window's rows that it reads
    features: int  # rows of features that it computes
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    @classmethod
    def of(cls, network: WindowPredictor, rows: slice, maps: int, features: int, padded: int) -> RowBand:
        """`maps` rows of the first convolution and `features` rows of the second, each after `padded` zero rows."""
        read = len(range(network.channels)[rows])
        return cls(
            rows,
            features,
            *_banded(network.conv1, read, maps, padded),
            *_banded(network.conv2, maps, features, padded),
        )

    def __call__(self, window_XRN: Tensor) -> Tensor:
        """Features summed over rows, [X, C, N − 2·REACH]; the input includes REACH neighbours at each side."""
        maps_XCN = F.conv1d(window_XRN[:, self.rows], self.weight1, self.bias1).relu_()
        features_XCN = F.conv1d(maps_XCN, self.weight2, self.bias2).relu_()
        return features_XCN.unflatten(1, (self.features, -1)).sum(1)


def _banded(conv: nn.Conv2d, rows_in: int, rows_out: int, padded: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 1-d convolution that computes `rows_out` rows of `conv` from `rows_in`."""
    maps_out, maps_in = conv.weight.shape[:2]
    weight = conv.weight.new_zeros(rows_out, maps_out, rows_in, maps_in, 3)
    for row in range(rows_out):
        for tap in range(3):
            read = row + tap - padded
            if 0 <= read < rows_in:  # the others are zero rows
                weight[row, :, read] = conv.weight[:, :, tap]
    assert conv.bias is not None
    return weight.flatten(2, 3).flatten(0, 1), conv.bias.repeat(rows_out)


def why_no_kernel(predictor: WindowPredictor, device: torch.device | str) -> str | None:
    """Why no kernel evaluates this network incrementally on that device; `None` if one does."""
    device, rows = torch.device(device), predictor.channels
    if not binding.on_gpu(device):
        return f"the predictor's kernels need a GPU, the device is {device.type}"
    maps, features = predictor.conv1.out_channels, predictor.conv2.out_channels
    if (rows, maps, features) != (ROWS, MAPS, FEATURES):
        return f"no kernel for a window of {rows} rows, {maps} maps and {features} features"
    return ops.why_no_kernels(device)


class IncrementalHistory(ScoreHistory):
    """A ScoreHistory of the published network, whose work per step does not grow with the window.

    It keeps sums for the whole capacity. Blocks that do not exist yet have scores of zero, the same as when they
    appear, so the sums stay valid while blocks are added. At the ends of the predicted range the network pads features
    with zeros, not scores. The columns near the ends, four a step, are therefore computed over the whole window. A
    window shorter than 5 rows has no interior and is evaluated directly.

    With `kernel`, kernels run the steps (`csrc/window.py`), with maps and weights of the second convolution in fp16;
    ConfigError if there is none (`why_no_kernel`).
    """

    predictor: WindowPredictor

    @torch.no_grad()
    def __init__(
        self,
        predictor: WindowPredictor,
        *,
        batch: int,
        kv_heads: int,
        device: torch.device | str,
        kernel: bool = False,
    ) -> None:
        if kernel and (reason := why_no_kernel(predictor, device)) is not None:
            raise ConfigError(f"kernel=True is not possible: {reason}")
        super().__init__(predictor, batch=batch, kv_heads=kv_heads, device=device)
        self.incremental = predictor.channels >= STENCIL
        with torch.inference_mode(False):
            shape = (batch, kv_heads, predictor.conv2.out_channels, 0)
            self._sum_BGCN = torch.zeros(shape, dtype=torch.float64, device=device)
            self._network = ops.pack_network(predictor.conv1, predictor.conv2, predictor.conv3) if kernel else None
            self._leaving = RowBand.of(predictor, slice(0, STENCIL), maps=3, features=1, padded=0)
            self._entering = RowBand.of(predictor, slice(-STENCIL, None), maps=3, features=1, padded=0)
            self._top = RowBand.of(predictor, slice(0, STENCIL - 1), maps=3, features=2, padded=1)
            self._bottom = RowBand.of(predictor, slice(1 - STENCIL, None), maps=3, features=2, padded=0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def start(self, rows_BGRN: Tensor) -> None:
        super().start(rows_BGRN)
        self._sum_up(0)

    def _observe(self, row_BGC: Tensor) -> None:
        if not self.incremental:
            super()._observe(row_BGC)
        elif self._network is not None:
            row_BGC = row_BGC.float().contiguous()
            ops.push_window(row_BGC, self._state_BGNC, self._sum_BGCN, *self._network)
        else:
            self._add(self._leaving, self._sum_BGCN, sign=-1)
            super()._observe(row_BGC)
            self._add(self._entering, self._sum_BGCN)

    def _score(self, columns: int, bounds: tuple[int, int, int, Tensor, Tensor | None]) -> Tensor:
        if not self.incremental:
            return super()._score(columns, bounds)
        if self._network is not None:
            return ops.score_window(self._state_BGNC, self._sum_BGCN, *self._network, columns, *bounds)
        network, candidate_BC = self.predictor, candidates_of(columns, *bounds)
        sum_BGCN = self._sum_BGCN[..., :columns].to(network.conv3.weight.dtype, copy=True)
        for band in (self._top, self._bottom):
            self._add(band, sum_BGCN)
        inner_XN = network.conv3(sum_BGCN.flatten(0, 1).div_(network.channels))[:, 0].float()
        scores_BGC = torch.where(candidate_BC[:, None], inner_XN.unflatten(0, self._sum_BGCN.shape[:2]), -torch.inf)
        return self._put_ends(scores_BGC, candidate_BC)

    def _put_ends(self, scores_BGC: Tensor, candidate_BC: Tensor) -> Tensor:
        """Replace the scores of the columns at both ends of the candidates, where the network pads with zeros.

        They are computed over the whole window of the columns that they depend on, candidates only.
        """
        (_, G, columns), R = scores_BGC.shape, self._state_BGNC.shape[3]
        among_B1 = candidate_BC.sum(1, keepdim=True)
        first_B1 = candidate_BC.int().argmax(1, keepdim=True)
        last_B1, place_E = first_B1 + among_B1, torch.arange(2 * REACH, device=scores_BGC.device)
        ends = (
            (first_B1 + place_E, place_E < REACH),
            (last_B1 - 2 * REACH + place_E, place_E >= REACH),
        )
        for column_BE, near_E in ends:
            within_BE = (column_BE >= first_B1) & (column_BE < last_B1)
            index_BGE = column_BE.clamp(0, columns - 1)[:, None].expand(-1, G, -1)
            window_BGER = self._state_BGNC.gather(2, index_BGE[..., None].expand(-1, -1, -1, R))
            end_BGE = self.predictor(window_BGER, within_BE)
            index_BGE = torch.where((within_BE & near_E)[:, None], index_BGE, -1)
            scores_BGC = scatter_or_drop(scores_BGC, index_BGE, end_BGE)
        return scores_BGC

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, n_blocks: int) -> None:
        super().crop(n_blocks)
        self._sum_up(max(0, n_blocks - REACH))  # the last columns had neighbours that are gone

    @torch.inference_mode(False)
    @torch.no_grad()
    def index(self, batch_index: Tensor) -> None:
        super().index(batch_index)
        self._sum_BGCN = self._sum_BGCN.index_select(0, batch_index.to(self._sum_BGCN.device))

    @torch.no_grad()
    def put(self, place: int, other: ScoreHistory) -> None:
        assert isinstance(other, IncrementalHistory)
        super().put(place, other)
        put_sequence(self._sum_BGCN, place, other._sum_BGCN)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._sum_BGCN.numel() * self._sum_BGCN.element_size()

    @torch.inference_mode(False)
    @torch.no_grad()
    def check_integrity(self) -> None:
        """As `ScoreHistory.check_integrity`; the sums must also be those of the window."""
        super().check_integrity()
        if self._sum_BGCN.shape[-1] != self._state_BGNC.shape[2]:
            raise IntegrityError(
                f"sums have room for {self._sum_BGCN.shape[-1]} blocks, the window for {self._state_BGNC.shape[2]}"
            )
        held_BGCN = self._sum_BGCN.clone()
        self._sum_up(0)
        error_BGCN = (self._sum_BGCN - held_BGCN).abs()
        share = 1e-4 if self._network is None else 1e-3  # torch may compute in TF32, the kernel does not
        if self.started and self.incremental and error_BGCN.max() > share * held_BGCN.abs().max() + 1e-6:
            raise IntegrityError(f"feature sums differ from those of the window by up to {error_BGCN.max():.3g}")

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> IncrementalHistory:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, IncrementalHistory)
        twin._sum_BGCN = self._sum_BGCN.clone()
        return twin

    @torch.inference_mode(False)
    @torch.no_grad()
    def reserve(self, n_blocks: int) -> None:
        super().reserve(n_blocks)
        known = self._sum_BGCN.shape[-1]
        if self.capacity > known:
            self._sum_BGCN = F.pad(self._sum_BGCN, (0, self.capacity - known))
            self._sum_up(max(0, known - REACH))

    def _sum_up(self, first: int) -> None:
        """Recompute the sums of columns from `first` on over the whole window."""
        if not self.started or not self.incremental:
            return
        network, weight = self.predictor, self.predictor.conv2.weight
        if self._network is not None:  # kernels must later subtract exactly these numbers
            weight = weight.half().to(weight.dtype)
        for low, high in self._tiles(first, self.capacity, rows=network.channels):
            maps_XCRN = F.conv2d(self._columns(low, high)[:, None], network.conv1.weight, network.conv1.bias).relu_()
            if self._network is not None:
                maps_XCRN = maps_XCRN.half().to(maps_XCRN.dtype)
            features_XCRN = F.conv2d(maps_XCRN, weight, network.conv2.bias).relu_()
            sum_BGCN = self._sum_BGCN[..., low:high]
            sum_BGCN.copy_(features_XCRN.sum(2, dtype=torch.float64).view_as(sum_BGCN))

    def _add(self, band: RowBand, out_BGCN: Tensor, sign: int = 1) -> None:
        """Add the band's features to `out_BGCN`, which has the first columns."""
        for low, high in self._tiles(0, out_BGCN.shape[-1], rows=1):
            part_BGCN = out_BGCN[..., low:high]
            part_BGCN.add_(band(self._columns(low, high)).view_as(part_BGCN), alpha=sign)

    def _columns(self, first: int, last: int) -> Tensor:
        """window_XRN of columns first − REACH to last + REACH − 1; zeros outside of the capacity."""
        low, high = max(0, first - REACH), min(self.capacity, last + REACH)
        window_XNR = self._state_BGNC[:, :, low:high].flatten(0, 1).to(self.predictor.conv1.weight.dtype)
        return F.pad(window_XNR.transpose(1, 2), (low - first + REACH, last + REACH - high))

    def _tiles(self, first: int, last: int, rows: int) -> list[tuple[int, int]]:
        batch, kv_heads = self._state_BGNC.shape[:2]
        width = max(64, TILE_COLUMNS // (rows * max(1, batch * kv_heads)))
        return [(low, min(low + width, last)) for low in range(first, last, width)]
