"""ScoreHistory: the predictor's state of one layer, for growing sequences.

Suffixes: B sequences, G KV heads, H query heads, S slots, R score rows (oldest first), N blocks, C block capacity; as
the last dimension of a state, C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.arithmetic import ceil_div, scatter_or_drop
from attention_predictor.csrc import binding, ops
from attention_predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.filters import FilterPredictor, PackedFilters
from attention_predictor.predictor.sequences import put_sequence

CHUNK_BLOCKS = 64  # capacity grows by this many blocks: doubling would waste the memory this library saves


def why_no_kernel(predictor: AttentionPredictor, device: torch.device | str) -> str | None:
    """Why no kernel supports this predictor's history on that device; `None` if one does."""
    device = torch.device(device)
    if not isinstance(predictor, FilterPredictor):
        return f"no kernel for the predictor {predictor.arch!r}"
    if not binding.on_gpu(device):
        return f"the predictor's kernels need a GPU, the device is {device.type}"
    return predictor.why_no_kernel() or ops.why_no_kernels(device)


def row_of_logits(
    peak_BHC: Tensor | None, block_BGS: Tensor, slot_peak_BHS: Tensor, total_BH: Tensor, capacity: int
) -> Tensor:
    """A step's score row, row_BGC: exp(logit − total) of each block, the maximum over the query heads of a KV head.

    Uses the exact logit if a slot holds the block, else the estimated one.

    Args:
        peak_BHC: fp32 estimated largest logit of each block; `None`: there are no estimates.
        block_BGS: int64 block in each slot, none twice in a row; -1 for a slot that takes no part.
        slot_peak_BHS: fp32 exact largest logit of each slot.
        total_BH: fp32 log-sum-exp of all logits.
        capacity: C.
    """
    (B, H, _), G = slot_peak_BHS.shape, block_BGS.shape[1]
    if peak_BHC is None:
        peak_BHC = slot_peak_BHS.new_full((B, H, capacity), -torch.inf)
    logit_BHC = scatter_or_drop(peak_BHC, block_BGS.repeat_interleave(H // G, 1), slot_peak_BHS)
    share_BHC = torch.exp(logit_BHC - total_BH[..., None]).masked_fill_(logit_BHC == -torch.inf, 0.0)
    return share_BHC.unflatten(1, (G, -1)).amax(2)


def candidates_of(
    columns: int, first: int, recent: int, block_size: int, length_B: Tensor, padding_B: Tensor | None
) -> Tensor:
    """The predictor's candidates among the first ``columns`` blocks, bool ``[B, C]``.

    Not candidates: the sink, padding, and the recent blocks of the step at length + 1. `csrc/candidates.cuh` computes
    the same; arguments are those of `ScoreHistory.predict_ahead`.
    """
    block_C = torch.arange(columns, device=length_B.device)
    first_B = torch.full_like(length_B, first) if padding_B is None else padding_B // block_size + first
    before_B = (length_B + 1 - max(recent, 1)).clamp_min(0) // block_size
    last_B = torch.minimum(before_B, ceil_div(length_B, block_size))
    return (block_C >= first_B[:, None]) & (block_C < last_B[:, None])


class ScoreHistory:
    """The predictor's state of every block of one layer, state_BGNC in the predictor's `state_dtype`.

    A new block starts as zeros. Spare capacity is kept at zero, so growing within it is free. Copies made by
    `copy.deepcopy` own their state and share the predictor.

    With `kernel`, kernels observe and predict decoding steps (`csrc/observe.py`, `csrc/predict.py`), else the
    predictor's own operations; ConfigError if there is none (`why_no_kernel`).
    """

    def __init__(
        self,
        predictor: AttentionPredictor,
        *,
        batch: int,
        kv_heads: int,
        device: torch.device | str,
        kernel: bool = False,
    ) -> None:
        if kernel and (reason := why_no_kernel(predictor, device)) is not None:
            raise ConfigError(f"kernel=True is not possible: {reason}")
        self.predictor = predictor
        self.kernel = kernel
        self.n_blocks = 0
        self.started = False
        self._packed: PackedFilters | None = None
        # Not in inference mode: inference tensors can't be written to outside of it.
        with torch.inference_mode(False):
            shape = (batch, kv_heads, 0, predictor.channels)
            self._state_BGNC = torch.zeros(shape, dtype=predictor.state_dtype, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def start(self, rows_BGRN: Tensor) -> None:
        """Forget everything and start from the prompt's last score rows (at least 1); N sets the number of blocks."""
        self._check("rows_BGRN", rows_BGRN, dims=4, at_least=0)
        self.crop(0)
        self._packed = None
        if rows_BGRN.shape[2] == 0:
            return
        self._grow(rows_BGRN.shape[-1])
        if self.kernel:
            self._fold(rows_BGRN[:, :, -self.predictor.rows :], fresh=True)
        else:
            self._state_BGNC[:, :, : self.n_blocks] = self.predictor.start(rows_BGRN)
        self.started = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(self, rows_BGRN: Tensor) -> None:
        """Observe several further rows (a prompt chunk, tokens to verify); N may have grown.

        With as many rows as the predictor starts from, earlier ones don't matter: the same as `start`.
        """
        if not self.started or rows_BGRN.shape[2] >= self.predictor.rows:
            if rows_BGRN.shape[2]:
                self._check("rows_BGRN", rows_BGRN, dims=4, at_least=self.n_blocks)
                self.start(rows_BGRN)
            return
        self._check("rows_BGRN", rows_BGRN, dims=4, at_least=self.n_blocks)
        if self.kernel and rows_BGRN.shape[2]:
            self._grow(rows_BGRN.shape[-1])
            self._fold(rows_BGRN)
            return
        for row_BGN in rows_BGRN.unbind(dim=2):
            self.push(row_BGN)

    def push(self, row_BGN: Tensor) -> None:
        """Observe a row that covers every block so far and may add new ones."""
        self._check("row_BGN", row_BGN, dims=3, at_least=self.n_blocks)
        self._grow(row_BGN.shape[-1])
        self.observe_row(F.pad(row_BGN, (0, self.capacity - row_BGN.shape[-1])))

    # The methods below need no host synchronisation: lengths are tensors, shapes follow from the capacity, and the
    # state is updated in place. So the same operations run one by one or as part of a CUDA graph. `advance` has counted
    # the token.

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_row(self, row_BGC: Tensor) -> None:
        """Observe one decoding step's row over the whole capacity, zero for blocks without tokens.

        For every predictor, a score of zero leaves a state of zeros unchanged. The first row starts the history.
        """
        self._check("row_BGC", row_BGC, dims=3, at_least=self.capacity)
        if not self.started:
            self.start(row_BGC[:, :, None, : self.n_blocks])
        else:
            self._observe(row_BGC)

    def _observe(self, row_BGC: Tensor) -> None:
        if self.kernel:
            self._fold(row_BGC[:, :, None])
            return
        observed_BGNC = self.predictor.observe(self._state_BGNC, row_BGC)
        if observed_BGNC.data_ptr() != self._state_BGNC.data_ptr():
            self._state_BGNC.copy_(observed_BGNC)

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_slots(
        self,
        peak_BHC: Tensor | None,
        block_BGS: Tensor,
        slot_peak_BHS: Tensor,
        total_BH: Tensor,
        length_B: Tensor,
        rest_BH: Tensor | None = None,
    ) -> None:
        """Observe the row that `row_of_logits` computes from these arguments; a kernel does both in one pass.

        Args:
            peak_BHC: fp32 estimates of C blocks, between the blocks that hold tokens and the capacity; those of blocks
                without tokens are ignored. `None`: there are no estimates.
            block_BGS, slot_peak_BHS: As in `row_of_logits`.
            total_BH: fp32 log-sum-exp of all logits.
            length_B: int64 tokens of each sequence, the new one included.
            rest_BH: fp32 log-sum-exp of logits that `total_BH` does not include; `None`: it includes all.
        """
        size, columns = self.predictor.block_size, self.capacity if peak_BHC is None else peak_BHC.shape[-1]
        if self.kernel and self.started:
            packed = self.packed
            arguments = (self._state_BGNC, packed.fold_C, packed.eps, size, columns * size, length_B, None)
            ops.observe_row(peak_BHC, block_BGS, slot_peak_BHS, total_BH, rest_BH, *arguments)
            return
        if rest_BH is not None:
            total_BH = torch.logaddexp(total_BH, rest_BH)
        row_BGC = row_of_logits(peak_BHC, block_BGS, slot_peak_BHS, total_BH, columns)
        begun_B1C = torch.arange(columns, device=length_B.device) < ceil_div(length_B, size)[:, None, None]
        self.observe_row(F.pad(torch.where(begun_B1C, row_BGC, 0.0), (0, self.capacity - columns)))

    @torch.no_grad()
    def predict_ahead(
        self, first: int, recent: int, length_B: Tensor, padding_B: Tensor | None, capacity: int
    ) -> Tensor:
        """Scores for the step after the one at `length_B` tokens, fp32 scores_BGC of `capacity` blocks.

        Sink and recent blocks are always kept. They are excluded *before* the prediction (AttentionPredictor, arXiv
        2502.04077, section 4), so that their large scores don't leak into their neighbours. They get −inf, and so do
        blocks without tokens.

        Args:
            first: First candidate, counted from the first block that is not all padding.
            recent: Last tokens (at least one) whose blocks are no candidates in the step at length + 1.
            length_B, padding_B: int64, tokens and left padding of each sequence; `None`: no padding.
            capacity: C, at most the history's capacity.
        """
        if not self.started:
            raise ValueError("predict_ahead needs a history that has started")
        if not 0 <= capacity <= self.capacity:
            raise ValueError(f"capacity must lie within 0..{self.capacity}, got {capacity}")
        if capacity == 0:
            return self._state_BGNC.new_empty((*self._state_BGNC.shape[:2], 0), dtype=torch.float32)
        return self._score(capacity, (first, recent, self.predictor.block_size, length_B, padding_B))

    def _score(self, columns: int, bounds: tuple[int, int, int, Tensor, Tensor | None]) -> Tensor:
        """Scores of the candidates (`candidates_of`) among the first columns, scores_BGC, −inf for all others."""
        if self.kernel:
            packed = self.packed
            return ops.predict_blocks(self._state_BGNC, packed.weight, packed.bias, columns, *bounds)
        candidate_BC = candidates_of(columns, *bounds)
        scores_BGC = self.predictor(self._state_BGNC[:, :, :columns], candidate_BC)
        return torch.where(candidate_BC[:, None], scores_BGC.float(), -torch.inf)

    def advance(self, n_blocks: int) -> None:
        """Set the host's count of blocks, before the step whose row has that many."""
        if not self.n_blocks <= n_blocks <= self.capacity:
            raise ValueError(f"n_blocks must lie within {self.n_blocks}..{self.capacity}, got {n_blocks}")
        self.n_blocks = n_blocks

    @property
    def capacity(self) -> int:
        """Blocks that the state has places for."""
        return self._state_BGNC.shape[2]

    @torch.no_grad()
    def crop(self, n_blocks: int) -> None:
        """Forget the blocks from `n_blocks` on.

        Rows already observed by the remaining blocks can't be removed; a few rows of rejected draft tokens only blur
        the ranking for a while.
        """
        if not 0 <= n_blocks <= self.n_blocks:
            raise ValueError(f"n_blocks must lie within 0..{self.n_blocks}, got {n_blocks}")
        self._state_BGNC[:, :, n_blocks:] = 0
        self.n_blocks = n_blocks
        self.started = self.started and n_blocks > 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def index(self, batch_index: Tensor) -> None:
        """Keep the sequences `batch_index` [new B], in that order (beams, expanded or filtered batches)."""
        self._state_BGNC = self._state_BGNC.index_select(0, batch_index.to(self._state_BGNC.device))

    @torch.no_grad()
    def put(self, place: int, other: ScoreHistory) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        put_sequence(self._state_BGNC, place, other._state_BGNC)
        self.n_blocks = max(self.n_blocks, other.n_blocks)
        self.started = self.started or other.started

    @torch.inference_mode(False)
    @torch.no_grad()
    def reserve(self, n_blocks: int) -> None:
        """Grow the capacity to at least `n_blocks`, keeping contents; the state may be reallocated."""
        batch, kv_heads, capacity, channels = self._state_BGNC.shape
        if n_blocks > capacity:
            chunks = ceil_div(n_blocks, CHUNK_BLOCKS)
            grown_BGNC = self._state_BGNC.new_zeros(batch, kv_heads, chunks * CHUNK_BLOCKS, channels)
            grown_BGNC[:, :, : self.n_blocks] = self._state_BGNC[:, :, : self.n_blocks]
            self._state_BGNC = grown_BGNC

    @property
    def state_BGNC(self) -> Tensor:
        """The state, including spare capacity (zeros); reallocated when the history grows beyond it."""
        return self._state_BGNC

    @property
    def packed(self) -> PackedFilters:
        """The predictor's weights in the kernels' layout, made at the first step after `start`, then kept in place."""
        if self._packed is None:
            assert isinstance(self.predictor, FilterPredictor)  # the only one with kernels
            self._packed = self.predictor.packed()
        return self._packed

    @property
    def nbytes(self) -> int:
        """Device memory held, spare capacity included."""
        return self._state_BGNC.numel() * self._state_BGNC.element_size()

    def check_integrity(self) -> None:
        """Raise IntegrityError if the state's shape, dtype, numbers or spare capacity are wrong."""
        state_BGNC, predictor = self._state_BGNC, self.predictor
        if state_BGNC.shape[3] != predictor.channels or state_BGNC.dtype != predictor.state_dtype:
            raise IntegrityError(
                f"history state is {state_BGNC.dtype} with {state_BGNC.shape[3]} channels, "
                f"expected {predictor.state_dtype} with {predictor.channels}"
            )
        if not 0 <= self.n_blocks <= state_BGNC.shape[2]:
            raise IntegrityError(f"history has {self.n_blocks} blocks in room for {state_BGNC.shape[2]}")
        if not torch.isfinite(state_BGNC).all():
            raise IntegrityError("history state holds NaN or infinity")
        if state_BGNC[:, :, self.n_blocks :].any():
            raise IntegrityError(f"history holds scores of blocks beyond its {self.n_blocks}")

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> ScoreHistory:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._state_BGNC = self._state_BGNC.clone()
        return twin

    def _fold(self, rows_BGRN: Tensor, *, fresh: bool = False) -> None:
        packed = self.packed
        ops.fold_rows(rows_BGRN.float().contiguous(), self._state_BGNC, packed.fold_C, packed.eps, fresh)

    def _grow(self, n_blocks: int) -> None:
        self.reserve(n_blocks)
        self.n_blocks = n_blocks

    def _check(self, name: str, rows: Tensor, *, dims: int, at_least: int) -> None:
        expected = tuple(self._state_BGNC.shape[:2])
        if rows.dim() != dims or tuple(rows.shape[:2]) != expected or rows.shape[-1] < at_least:
            raise ValueError(
                f"{name} must have {dims} dimensions, start with {expected} and cover at least "
                f"{at_least} blocks, got shape {tuple(rows.shape)}"
            )
