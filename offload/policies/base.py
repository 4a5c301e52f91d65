"""What a selection policy is: one layer's judgement of which blocks matter.

Suffixes: B sequences, G KV heads, R rows = B·G, H query heads, T tokens, L tokens of the sequence, D head size, N
blocks, Q queries, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.errors import IntegrityError
from attention_predictor.offload.attention.dense import ScoreRows, Terms, score_rows
from attention_predictor.offload.attention.sparse import SlotScores, SparseAttention, score_slots
from attention_predictor.offload.policies.selection import Selection

if TYPE_CHECKING:
    from attention_predictor.offload.chunk import Chunk
    from attention_predictor.offload.config import OffloadConfig
    from attention_predictor.predictor.model import AttentionPredictor

When = Literal["ahead", "now", "all"]
ReadKeys = Callable[[int, int], Tensor]


class Part(Protocol):
    """Device state that follows its sequences: a history, a sketch, block bounds."""

    @property
    def nbytes(self) -> int: ...

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
    """One number for each block, value_BGN on the device: what a policy remembers of a layer.

    Always exchanged as a whole, never written into: tensors made under inference mode would not allow it later.
    """

    def __init__(self, spec: LayerSpec, fill: float | bool = 0.0) -> None:
        dtype = torch.bool if isinstance(fill, bool) else torch.float32
        self.fill = fill
        self.value_BGN = torch.full((spec.batch, spec.kv_heads, 0), fill, dtype=dtype, device=spec.device)

    @property
    def n_blocks(self) -> int:
        return self.value_BGN.shape[-1]

    def grow(self, n_blocks: int, fill: float | bool | None = None) -> Tensor:
        """At least so many blocks, new ones with ``fill`` (by default the one of the first blocks); the new value."""
        more = max(n_blocks - self.n_blocks, 0)
        self.value_BGN = F.pad(self.value_BGN, (0, more), value=self.fill if fill is None else fill)
        return self.value_BGN

    def crop(self, n_blocks: int) -> None:
        self.value_BGN = self.value_BGN[..., :n_blocks]

    def index(self, batch_index: Tensor) -> None:
        self.value_BGN = self.value_BGN[batch_index]

    @property
    def nbytes(self) -> int:
        return self.value_BGN.nbytes

    def check_integrity(self) -> None:
        if bool(self.value_BGN.isnan().any()):
            raise IntegrityError(f"values of {self.n_blocks} blocks: some are NaN")


@dataclass
class Step:
    """One decoding step in one layer, as a policy sees it.

    Attributes:
        query_BHD: The new token's queries.
        length: Tokens in the cache, the new one included.
        real_BL: bool, False at padding, or ``None``.
        terms: How logits are made.
        stream: Gives all keys and values of the layer, chunk by chunk, from host memory.
        pool_key_BGSTD: Keys in the pool.
        resident_RS: Block in each slot before the step (-1: none), on the host.
        kernel: Whether a kernel reads the pool.
        block_BGS, attention: Set once attention has run: the block in each attended slot (-1: none) and the result.
    """

    query_BHD: Tensor
    length: int
    real_BL: Tensor | None
    terms: Terms
    kv_heads: int
    block_size: int
    stream: Callable[[Tensor], Iterator[Chunk]]
    pool_key_BGSTD: Tensor
    resident_RS: Tensor
    kernel: bool = False
    block_BGS: Tensor = field(init=False)
    attention: SparseAttention = field(init=False)

    @cached_property
    def exact(self) -> ScoreRows:
        """The true row of this step; reads every key of the layer from host memory."""
        return self.true_rows(self.query_BHD[:, :, None])

    @cached_property
    def resident_BGS(self) -> Tensor:
        """``resident_RS`` on the device."""
        return self.resident_RS.view(len(self.query_BHD), self.kv_heads, -1).to(self.query_BHD.device)

    @cached_property
    def resident_scores(self) -> SlotScores:
        """Exact scores of what is resident before the step; to be asked for before anything is fetched late."""
        return score_slots(
            self.query_BHD,
            self.pool_key_BGSTD,
            self.resident_BGS,
            self.length,
            self.real_BL,
            self.terms,
            kernel=self.kernel,
        )

    def true_rows(self, query_BHQD: Tensor) -> ScoreRows:
        """The true rows of this and the steps before it, given their queries; reads every key once."""
        terms = Terms(self.terms.scaling, self.terms.softcap, self.terms.sinks_H, self.real_BL)
        return score_rows(
            query_BHQD,
            self.stream(query_BHQD),
            self.length,
            terms,
            kv_heads=self.kv_heads,
            block_size=self.block_size,
        )

    @property
    def n_blocks(self) -> int:
        return -(-self.length // self.block_size)

    @property
    def attended_BGN(self) -> Tensor:
        """bool, True for the blocks that this step attended to."""
        B, G, _ = self.block_BGS.shape
        # Slots that took no part write to one column more, which is cut off.
        mask = torch.zeros((B, G, self.n_blocks + 1), dtype=torch.bool, device=self.block_BGS.device)
        return mask.scatter_(-1, self.block_BGS % (self.n_blocks + 1), True)[..., :-1]

    @cached_property
    def seen(self) -> ScoreRows:
        """The row of this step over the blocks it attended to and normalised over them; zero at the others."""
        peak_BHS, sum_BHS = (torch.exp(part - self.attention.lse_BH[..., None]) for part in self.attention.scores)
        B, G, _ = self.block_BGS.shape
        zeros_BG1N = sum_BHS.new_zeros((B, G, 1, self.n_blocks + 1))
        # Slots that took no part write to one column more, which is cut off.
        index_BG1S = (self.block_BGS % (self.n_blocks + 1))[:, :, None]
        return ScoreRows(
            zeros_BG1N.scatter(-1, index_BG1S, peak_BHS.unflatten(1, (G, -1)).amax(2, keepdim=True))[..., :-1],
            zeros_BG1N.scatter(-1, index_BG1S, sum_BHS.unflatten(1, (G, -1)).mean(2, keepdim=True))[..., :-1],
        )


class Policy:
    """Selects the blocks of one layer. A policy overrides what it needs; its name is its entry in the registry.

    ``selects`` says when: ``"ahead"`` for the next token, so that the fetch hides behind this one; ``"now"`` with the
    current query, so that it can't; ``"all"`` attends to everything and selects nothing. ``evicts`` says that a block
    once left out is never selected again, by definition; the host store holds it all the same. ``allocation`` is how
    its paper has layers share the budget (``offload/policies/allocation.py``).

    Attributes:
        selection: The layer's budget and what goes with it; the layer sets it, anew if its budget changes.
        padding_B: int64, tokens of left padding of each sequence, ``None`` where there is none; the layer sets it.
    """

    name: ClassVar[str]
    selects: ClassVar[When]
    evicts: ClassVar[bool] = False
    allocation: ClassVar[str] = "uniform"
    prompt_rows: int = 0  # score rows of the last prompt queries it wants to see

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.selection = Selection.of(spec.config)
        self.padding_B: Tensor | None = None

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
    def never_captured(cls, config: OffloadConfig) -> str | None:
        """Why its steps can't be captured under these settings, whatever the model; ``None`` if they may be."""
        return f"policy {cls.name!r} asks the host at every step"

    @property
    def no_graph(self) -> str | None:
        """Why its steps can't be captured; ``None`` if they can (``device_step.py``)."""
        return self.never_captured(self.spec.config)

    @property
    def is_started(self) -> bool:
        """Whether it has seen enough for a step that is captured."""
        return True

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens in its parts, whose tensors then stay where they are."""

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        """New tokens, about to be attended: their keys, just put into the cache, and their queries (Q = T)."""

    def observe_rows(self, rows: ScoreRows) -> None:
        """The true rows of the last ``prompt_rows`` of the queries that were just attended in full."""

    def observe(self, step: Step) -> None:
        """A step has attended; ``step.attention`` is set."""

    def score_next(self, length: int) -> Tensor | None:
        """Block scores ``[B, G, N]`` for the step at ``length`` tokens, ``None`` to keep sink and recent alone."""
        return None

    def score_now(self, step: Step) -> Tensor:
        """Block scores ``[B, G, N]`` with the current query; called before attention if it ``chooses``."""
        raise TypeError(f"policy {self.name!r} has late_share={self.late_share} but does not score now")

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        """Forget all tokens from ``length`` on; ``read_keys(start, stop)`` gives exact keys ``[B, G, T, D]``."""

    def index(self, batch_index: Tensor) -> None:
        """Reorder, repeat or select sequences."""
        for part in self.parts.values():
            part.index(batch_index)

    def check_integrity(self) -> None:
        for part in self.parts.values():
            part.check_integrity()


def newest_first(scores_BGN: Tensor, first: int) -> Tensor:
    """The scores with the blocks from ``first`` on above all others, the newest highest."""
    newer = max(scores_BGN.shape[-1] - first, 0)
    if newer == 0:
        return scores_BGN
    top_BG1 = scores_BGN.amax(-1, keepdim=True).clamp_min(0)
    place_N = torch.arange(1, newer + 1, device=scores_BGN.device)
    return torch.cat([scores_BGN[..., :first], top_BG1 + place_N], -1)
