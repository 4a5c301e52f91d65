"""Policy: the interface of selection policies, which rank one layer's blocks.

To add a policy, subclass ``Policy`` in a new file here, set ``name`` and ``selects``, override the hooks it needs, and
add it to ``offload/policy_names.py``. Order of the hooks: ``extend`` and ``observe_rows`` after a prompt; in each step
``advance``, ``append``, ``score_now``, attention, ``observe``, ``score_next``.

In a decoding step a policy uses tensor arithmetic only: lengths are tensors (``Extent``), its state has the shape of
the capacity and is written in place, and the host reads no value. So the same code runs eagerly, on another stream, or
captured in a CUDA graph. ``advance`` alone runs on the host.

Suffixes: B sequences, G KV heads, H query heads, T tokens, L token capacity, D head size, C block capacity, N blocks, Q
queries, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div, spread
from attention_predictor.csrc.ops import Estimates
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.attention.dense import ScoreRows, Terms, score_rows
from attention_predictor.offload.attention.sparse import SparseAttention
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.chunk import Chunk
from attention_predictor.predictor.sequences import put_sequence

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig
    from attention_predictor.predictor.model import AttentionPredictor

When = Literal["ahead", "now", "all"]
ReadKeys = Callable[[int, int], Tensor]


class Part(Protocol):
    """A part of a policy's device state, such as a history, a sketch or block bounds."""

    @property
    def nbytes(self) -> int: ...

    def reserve(self, capacity: int) -> None: ...

    def index(self, batch_index: Tensor) -> None: ...

    def put(self, place: int, other: Any) -> None: ...

    def check_integrity(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The arguments of a policy: the shape of one layer's cache, and the engine's settings."""

    config: OffloadConfig
    predictor: AttentionPredictor | None
    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __deepcopy__(self, memo: dict) -> LayerSpec:
        return self  # copies of a cache share settings and weights


class BlockValues:
    """One number per block, value_BGC on the device: state of a policy in one layer, written in place."""

    def __init__(self, spec: LayerSpec, fill: float | bool = 0.0) -> None:
        dtype = torch.bool if isinstance(fill, bool) else torch.float32
        self.fill = fill
        with torch.inference_mode(False):  # inference tensors can't be written to outside of that mode
            self.value_BGC = torch.full((spec.batch, spec.kv_heads, 0), fill, dtype=dtype, device=spec.device)

    @torch.inference_mode(False)
    def reserve(self, capacity: int) -> None:
        """Grow to at least ``capacity`` blocks."""
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

    def put(self, place: int, other: BlockValues) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        put_sequence(self.value_BGC, place, other.value_BGC, self.fill)

    @property
    def nbytes(self) -> int:
        return self.value_BGC.nbytes

    def check_integrity(self) -> None:
        if bool(self.value_BGC.isnan().any()):
            raise IntegrityError(f"values of {self.value_BGC.shape[-1]} blocks: some are NaN")


class SequenceValues:
    """One number per sequence, value_B on the device: state of a policy in one layer, written in place."""

    def __init__(self, spec: LayerSpec, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # inference tensors can't be written to outside of that mode
            self.value_B = torch.zeros(spec.batch, dtype=dtype, device=spec.device)

    def reserve(self, capacity: int) -> None:
        """Nothing to do: it has no numbers of blocks."""

    @torch.inference_mode(False)
    def index(self, batch_index: Tensor) -> None:
        self.value_B = self.value_B[batch_index]

    def put(self, place: int, other: SequenceValues) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        put_sequence(self.value_B, place, other.value_B)

    @property
    def nbytes(self) -> int:
        return self.value_B.nbytes

    def check_integrity(self) -> None:
        """Any number will do."""


@dataclass
class Step:
    """One decoding step in one layer, as a policy sees it.

    Attributes:
        query_BHD: The new token's queries.
        extent: The sequences' lengths, the new token included.
        real_BL: bool, False at padding, or ``None``.
        terms: Scaling, softcap and sinks of the logits.
        kernel: Whether kernels read the pool.
        length: Tokens in the cache, as the host counts them; only for ``exact``.
        stream: Yields all keys and values of the layer from host memory, in chunks; only for ``exact``.
        estimates: The result of the policy's ``score_now``, with exact peaks for resident blocks.
        rest_BH: fp32 estimated log-sum-exp of all blocks not attended to.
        block_BGS, attention: Set by attention: the block in each attended slot (-1: none), and the result.
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
        """The true score row of this step, N blocks. Reads every key from host memory, so it can't be captured."""
        return self.true_rows(self.query_BHD[:, :, None])

    def true_rows(self, query_BHQD: Tensor) -> ScoreRows:
        """The true score rows of these queries, of this step and those before it. Reads every key once."""
        real_BL = None if self.real_BL is None else self.real_BL[:, : self.length]
        terms = Terms(self.terms.scaling, self.terms.softcap, self.terms.sinks_H, real_BL)
        chunks, size = self.stream(query_BHQD), self.extent.block_size
        return score_rows(query_BHQD, chunks, self.length, terms, kv_heads=self.kv_heads, block_size=size)

    @property
    def blocks(self) -> int:
        """N, the blocks that hold ``length`` tokens."""
        return ceil_div(self.length, self.extent.block_size)

    @property
    def attended_BGC(self) -> Tensor:
        """bool, True for the blocks that this step attended to."""
        return spread(self.block_BGS >= 0, self.block_BGS, self.extent.capacity)

    @property
    def left_out_BGC(self) -> Tensor:
        """bool, True for the blocks that hold a token and that this step did not attend to."""
        return self.extent.begun_BC[:, None] > self.attended_BGC

    @property
    def score_BGC(self) -> Tensor:
        """This step's score row, normalised over the attended blocks; zero for all others."""
        return spread(self._share(self.attention.scores.peak_BHS).amax(2), self.block_BGS, self.extent.capacity)

    @property
    def mass_BGC(self) -> Tensor:
        """Its masses, likewise."""
        return spread(self._share(self.attention.scores.sum_BHS).mean(2), self.block_BGS, self.extent.capacity)

    def _share(self, lse_BHS: Tensor) -> Tensor:
        """Probabilities from log-sum-exps, by KV head: ``[B, G, H/G, S]``."""
        return torch.exp(lse_BHS - self.attention.lse_BH[..., None]).unflatten(1, (self.kv_heads, -1))


class Policy:
    """Selects the blocks of one layer. A subclass overrides the hooks it needs.

    Attributes:
        name: The policy's name in settings and on the command line.
        selects: When it selects. ``"ahead"``: for the next token, so that fetches overlap with computation; ``"now"``:
            with the current query, so that the step waits for fetches; ``"all"``: never, it attends to everything.
        evicts: Whether a block that was once left out is never selected again, as the method defines. The host store
            still holds it.
        allocation: How the method's paper shares the budget between layers (``offload/policies/allocation.py``).
        budget_G: int64 on the device, the budget of each KV head in tokens, from ``selection``.
    """

    name: ClassVar[str]
    selects: ClassVar[When]
    evicts: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    prompt_rows: int = 0  # how many of the last prompt queries' score rows it observes

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.selection = Selection.of(spec.config)

    @property
    def selection(self) -> Selection:
        """The layer's budget; the layer sets it, again whenever the budget changes."""
        return self._selection

    @selection.setter
    @torch.inference_mode(False)
    def selection(self, selection: Selection) -> None:
        self._selection = selection
        own = selection.heads or (selection.budget,) * self.spec.kv_heads
        self.budget_G = torch.tensor(own, device=self.spec.device)
        self.rebudget()

    def rebudget(self) -> None:
        """Called whenever ``budget_G`` is set, to derive constants of a step from it."""

    @property
    def parts(self) -> dict[str, Part]:
        """Its device state by name, for memory accounting and for reordering sequences."""
        return {}

    def late_share(self, batch: int) -> float:
        """Largest share of the budget that may be fetched within a step of so many sequences."""
        return 1.0 if self.selects == "now" else 0.0

    @property
    def chooses(self) -> bool:
        """Whether it chooses with the current query, among resident blocks and a limited number of late fetches."""
        return self.late_share(1) > 0

    @classmethod
    def why_never_captured(cls, config: OffloadConfig) -> str | None:
        """Why its steps can't be captured with these settings, for any model; ``None`` if they can."""
        return None

    def why_no_kernel(self) -> str | None:
        """Why a part of its step has no kernel on this device, so that it can't be captured; ``None`` if all have."""
        return None

    @property
    def reads_all_keys(self) -> bool:
        """Whether the step that ``advance`` counted uses ``Step.exact``. Such steps are not captured; others are."""
        return False

    @property
    def may_read_all_keys(self) -> bool:
        """Whether any step uses ``Step.exact``."""
        return False

    @property
    def is_started(self) -> bool:
        """Whether it has enough state for captured steps."""
        return True

    def reserve(self, capacity: int) -> None:
        """Grow its parts to at least ``capacity`` blocks."""
        for part in self.parts.values():
            part.reserve(capacity)

    def advance(self) -> None:
        """Count the next step's token on the host; called before the step."""

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        """Take keys and queries (Q = T) of a forward that is not a decoding step, just stored in the cache."""

    def observe_rows(self, rows: ScoreRows) -> None:
        """Take the true score rows, N blocks, of the last ``prompt_rows`` queries of such a forward."""

    def append(self, key_BGD: Tensor, query_BHD: Tensor, extent: Extent) -> None:
        """Take the step's new key and query; ``extent`` already counts the token."""

    def score_now(self, step: Step) -> Tensor | Estimates | None:
        """Block scores ``[B, G, C]`` with the current query, before attention; required if it ``chooses``.

        Or estimates of all blocks' logits. Then blocks are ranked by estimated mass, and ``step.rest_BH`` is set, even
        for a policy that does not choose.
        """
        if self.chooses:
            raise TypeError(f"policy {self.name!r} has late_share={self.late_share(1)} but does not score now")
        return None

    def observe(self, step: Step) -> None:
        """Called after a step's attention; ``step.attention`` is set."""

    def score_next(self, extent: Extent) -> Tensor | None:
        """Block scores ``[B, G, C]`` for the step after ``extent``; ``None``: sink and recent only."""
        return None

    def unspent(self, extent: Extent) -> Tensor | None:
        """Tokens of its budget that each row leaves in the step after ``extent``, int64 BG; ``None``: none."""
        return None

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        """Forget all tokens from ``length`` on; ``read_keys(start, stop)`` returns exact keys ``[B, G, T, D]``."""

    def index(self, batch_index: Tensor) -> None:
        """Reorder, repeat or select sequences."""
        for part in self.parts.values():
            part.index(batch_index)

    def put(self, place: int, other: Policy) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        theirs = other.parts
        for name, part in self.parts.items():
            part.put(place, theirs[name])

    def check_integrity(self) -> None:
        for part in self.parts.values():
            part.check_integrity()


def newest_first(scores_BGC: Tensor, first_BG: Tensor, extent: Extent) -> Tensor:
    """The scores, raised above all others for blocks from ``first_BG`` (or ``[B, 1]``) on, the newest highest."""
    top_BG1 = scores_BGC.amax(-1, keepdim=True).clamp_min(0)
    place_BGC = extent.block_C - first_BG[..., None] + 1
    return torch.where(place_BGC > 0, top_BG1 + place_BGC, scores_BGC)
