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
from torch import Tensor

from attention_predictor.offload.dense import Chunk, ScoreRows, Terms, score_rows
from attention_predictor.offload.sparse import SlotScores, SparseAttention, score_slots

if TYPE_CHECKING:
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


class Policy:
    """Selects the blocks of one layer. A policy overrides what it needs; its name is its entry in the registry.

    ``selects`` says when: ``"ahead"`` for the next token, so that the fetch hides behind this one; ``"now"`` with the
    current query, so that it can't; ``"all"`` attends to everything and selects nothing.
    """

    name: ClassVar[str]
    selects: ClassVar[When]
    prompt_rows: int = 0  # score rows of the last prompt queries it wants to see

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec

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
