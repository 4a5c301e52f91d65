"""What a selection policy is: one layer's judgement of which blocks matter.

A policy's part in a decoding step is tensor arithmetic: lengths are tensors (``Extent``), what it remembers has the
shape of the room there is and is written in place, and no value is read by the host. So the same lines run one by one,
beside the model, or captured in a CUDA graph.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, T tokens, L tokens there is room for, D head size, C
blocks there is room for, N blocks, Q queries, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div, scatter_or_drop
from attention_predictor.csrc.ops import Estimates
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.attention.dense import ScoreRows, Terms, score_rows
from attention_predictor.offload.attention.sparse import SparseAttention
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.chunk import Chunk

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig
    from attention_predictor.predictor.model import AttentionPredictor

When = Literal["ahead", "now", "all"]
ReadKeys = Callable[[int, int], Tensor]


class Part(Protocol):
    """Device state that follows its sequences: a history, a sketch, block bounds."""

    @property
    def nbytes(self) -> int: ...

    def reserve(self, capacity: int) -> None: ...

    def index(self, batch_index: Tensor) -> None: ...

    def check_integrity(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What a policy is built from: the shape of one layer's cache and the engine's settings."""

    config: OffloadConfig
    predictor: AttentionPredictor | None
    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __deepcopy__(self, memo: dict) -> LayerSpec:
        return self  # settings and shared weights: copies of a cache use the same


class BlockValues:
    """One number for each block, value_BGC on the device: what a policy remembers of a layer. Written in place."""

    def __init__(self, spec: LayerSpec, fill: float | bool = 0.0) -> None:
        dtype = torch.bool if isinstance(fill, bool) else torch.float32
        self.fill = fill
        with torch.inference_mode(False):  # what is made there could not be written to outside of it later
            self.value_BGC = torch.full((spec.batch, spec.kv_heads, 0), fill, dtype=dtype, device=spec.device)

    @torch.inference_mode(False)
    def reserve(self, capacity: int) -> None:
        """Room for so many blocks."""
        more = capacity - self.value_BGC.shape[-1]
        if more > 0:
            room_BGC = self.value_BGC.new_full((*self.value_BGC.shape[:2], more), self.fill)
            self.value_BGC = torch.cat([self.value_BGC, room_BGC], -1)

    def crop(self, n_blocks: int) -> None:
        """Forget the blocks from ``n_blocks`` on."""
        self.value_BGC[..., n_blocks:] = self.fill

    @torch.inference_mode(False)
    def index(self, batch_index: Tensor) -> None:
        self.value_BGC = self.value_BGC[batch_index]

    @property
    def nbytes(self) -> int:
        return self.value_BGC.nbytes

    def check_integrity(self) -> None:
        if bool(self.value_BGC.isnan().any()):
            raise IntegrityError(f"values of {self.value_BGC.shape[-1]} blocks: some are NaN")


@dataclass
class Step:
    """One decoding step in one layer, as a policy sees it.

    Attributes:
        query_BHD: The new token's queries.
        extent: How far the sequences have come, the new token included.
        real_BL: bool, False at padding, or ``None``.
        terms: How logits are made.
        kernel: Whether kernels read the pool.
        length: Tokens in the cache, as the host counts them; for ``exact`` alone.
        stream: Gives all keys and values of the layer, chunk by chunk, from host memory; for ``exact`` alone.
        estimates: What the policy's ``score_now`` has estimated, with exact peaks where a block was resident.
        rest_BH: fp32 log-sum-exp of all blocks not attended to, by the estimates.
        block_BGS, attention: Set once attention has run: the block in each attended slot (-1: none) and the result.
    """

    query_BHD: Tensor
    extent: Extent
    real_BL: Tensor | None
    terms: Terms
    kv_heads: int
    kernel: bool
    length: int
    stream: Callable[[Tensor], Iterator[Chunk]]
    estimates: Estimates | None = None
    rest_BH: Tensor | None = None
    block_BGS: Tensor = field(init=False)
    attention: SparseAttention = field(init=False)

    @cached_property
    def exact(self) -> ScoreRows:
        """The true row of this step, N blocks; reads every key of the layer from host memory, which no capture can."""
        return self.true_rows(self.query_BHD[:, :, None])

    def true_rows(self, query_BHQD: Tensor) -> ScoreRows:
        """The true rows of this and the steps before it, given their queries; reads every key once."""
        real_BL = None if self.real_BL is None else self.real_BL[:, : self.length]
        terms = Terms(self.terms.scaling, self.terms.softcap, self.terms.sinks_H, real_BL)
        chunks, size = self.stream(query_BHQD), self.extent.block_size
        return score_rows(query_BHQD, chunks, self.length, terms, kv_heads=self.kv_heads, block_size=size)

    @property
    def blocks(self) -> int:
        """N, the blocks that ``length`` tokens take."""
        return ceil_div(self.length, self.extent.block_size)

    @property
    def attended_BGC(self) -> Tensor:
        """bool, True for the blocks that this step attended to."""
        B, G, _ = self.block_BGS.shape
        nothing_BGC = torch.zeros((B, G, self.extent.capacity), dtype=torch.bool, device=self.block_BGS.device)
        return scatter_or_drop(nothing_BGC, self.block_BGS, True)

    @cached_property
    def seen(self) -> ScoreRows:
        """The row of this step over the blocks it attended to and normalised over them; zero at the others, Q = 1."""
        peak_BHS, sum_BHS = (torch.exp(part - self.attention.lse_BH[..., None]) for part in self.attention.scores)
        B, G, _ = self.block_BGS.shape
        zeros_BG1C = sum_BHS.new_zeros((B, G, 1, self.extent.capacity))
        block_BG1S = self.block_BGS[:, :, None]
        return ScoreRows(
            scatter_or_drop(zeros_BG1C, block_BG1S, peak_BHS.unflatten(1, (G, -1)).amax(2, keepdim=True)),
            scatter_or_drop(zeros_BG1C, block_BG1S, sum_BHS.unflatten(1, (G, -1)).mean(2, keepdim=True)),
        )


class Policy:
    """Selects the blocks of one layer. A policy overrides what it needs; its name is its entry in the registry.

    ``selects`` says when: ``"ahead"`` for the next token, so that the fetch hides behind this one; ``"now"`` with the
    current query, so that it can't; ``"all"`` attends to everything and selects nothing. ``evicts`` says that a block
    once left out is never selected again, by definition; the host store holds it all the same. ``allocation`` is how
    its paper has layers share the budget (``offload/policies/allocation.py``).

    Attributes:
        budget_G: int64 on the device, tokens of each KV head, by ``selection``.
    """

    name: ClassVar[str]
    selects: ClassVar[When]
    evicts: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    prompt_rows: int = 0  # score rows of the last prompt queries it wants to see

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.selection = Selection.of(spec.config)

    @property
    def selection(self) -> Selection:
        """The layer's budget and what goes with it; the layer sets it, anew if its budget changes."""
        return self._selection

    @selection.setter
    @torch.inference_mode(False)
    def selection(self, selection: Selection) -> None:
        self._selection = selection
        own = selection.heads or (selection.budget,) * self.spec.kv_heads
        self.budget_G = torch.tensor(own, device=self.spec.device)

    @property
    def parts(self) -> dict[str, Part]:
        """Its device state by name, for memory accounting and for whatever reorders sequences."""
        return {}

    @property
    def late_share(self) -> float:
        """Share of the budget that may be fetched within a step."""
        return 1.0 if self.selects == "now" else 0.0

    @property
    def chooses(self) -> bool:
        """Whether it chooses with the current query: among resident blocks, and those it may fetch within the step."""
        return self.late_share > 0

    @classmethod
    def not_captured(cls, config: OffloadConfig) -> str | None:
        """Why its steps can't be captured under these settings, whatever the model; ``None`` if they can."""
        return None

    @property
    def lacks_kernel(self) -> str | None:
        """Which part of it asks the host on this device, for want of a kernel, so that it can't be captured."""
        return None

    @property
    def reads_all_keys(self) -> bool:
        """Whether the step that ``advance`` has counted asks for ``Step.exact``: it is not captured, others are."""
        return False

    @property
    def may_read_all_keys(self) -> bool:
        """Whether any step does."""
        return False

    @property
    def is_started(self) -> bool:
        """Whether it has seen enough for a step that is captured."""
        return True

    def reserve(self, capacity: int) -> None:
        """Room for so many blocks in its parts."""
        for part in self.parts.values():
            part.reserve(capacity)

    def advance(self) -> None:
        """The host's counts follow one token on; comes before the step."""

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        """Tokens of a forward that is no decoding step, just put into the cache: their keys and queries (Q = T)."""

    def observe_rows(self, rows: ScoreRows) -> None:
        """The true rows of the last ``prompt_rows`` of the queries that were just attended in full, N blocks."""

    def append(self, key_BGD: Tensor, query_BHD: Tensor, extent: Extent) -> None:
        """The step's new token, which ``extent`` counts already: its keys and queries."""

    def score_now(self, step: Step) -> Tensor | Estimates | None:
        """Block scores ``[B, G, C]`` with the current query, before attention: needed if it ``chooses``.

        Or estimates of all blocks' logits: blocks are chosen by the share that each has, and what is not attended to
        is known (``step.rest_BH``), also if it does not choose.
        """
        if self.chooses:
            raise TypeError(f"policy {self.name!r} has late_share={self.late_share} but does not score now")
        return None

    def observe(self, step: Step) -> None:
        """A step has attended; ``step.attention`` is set."""

    def score_next(self, extent: Extent) -> Tensor | None:
        """Block scores ``[B, G, C]`` for the step after the one at ``extent``; ``None``: sink and recent alone."""
        return None

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        """Forget all tokens from ``length`` on; ``read_keys(start, stop)`` gives exact keys ``[B, G, T, D]``."""

    def index(self, batch_index: Tensor) -> None:
        """Reorder, repeat or select sequences."""
        for part in self.parts.values():
            part.index(batch_index)

    def check_integrity(self) -> None:
        for part in self.parts.values():
            part.check_integrity()


def newest_first(scores_BGC: Tensor, first_BG: Tensor, extent: Extent) -> Tensor:
    """The scores with the blocks from ``first_BG`` (or ``[B, 1]``) on above all others, the newest highest."""
    top_BG1 = scores_BGC.amax(-1, keepdim=True).clamp_min(0)
    place_BGC = extent.block_C - first_BG[..., None] + 1
    return torch.where(place_BGC > 0, top_BG1 + place_BGC, scores_BGC)
