"""Observes what a model's layers attend with: queries, keys and their rotation.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens of a chunk, D head size, R angles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from attention_predictor.eval.analysis.rope import Rotation
from attention_predictor.offload.attention.dense import LOGITS_BYTES, Terms, scaled_logits
from attention_predictor.offload.chunk import Chunk, split
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.step.step import chunks

LEAST_TOKENS = 256  # smallest chunk of keys


@dataclass(frozen=True)
class Angles:
    """Rotation angles a module applied to some tokens, in the model's own format."""

    module: nn.Module
    cos_BQR: Tensor
    sin_BQR: Tensor

    def last(self, tokens: int) -> Angles:
        """The angles of the last ``count`` tokens."""
        return Angles(self.module, self.cos_BQR[:, -tokens:], self.sin_BQR[:, -tokens:])


@dataclass(frozen=True)
class Attended:
    """Inputs of a layer's last attention call: queries of the last tokens; the cache stores all keys.

    Attributes:
        number: The layer's number.
        query_BHQD: Queries at the attention call, normalised and rotated if the model does so.
        angles: Cosines and sines that rotated these tokens, and the module that did; ``None`` where nothing was.
    """

    number: int
    query_BHQD: Tensor
    terms: Terms
    angles: Angles | None
    layer: TieredLayer

    @property
    def length(self) -> int:
        """Tokens in the cache, including these."""
        return self.layer.blocks.length

    @cached_property
    def rotation(self) -> Rotation | None:
        """Of these tokens; ``None`` where the layer rotates nothing, or nothing tells how it does."""
        if self.angles is None:
            return None
        return Rotation.of(self.angles.module, self.angles.cos_BQR, self.angles.sin_BQR, self.query_BHQD.shape[-1])

    @property
    def plain_BHQD(self) -> Tensor | None:
        """The queries before they were rotated, fp32; ``None`` where there is no ``rotation``."""
        return None if self.rotation is None else self.rotation.undo(self.query_BHQD)

    def last(self, queries: int) -> Attended:
        """The last ``count`` queries, or all if there are fewer."""
        Q = self.query_BHQD.shape[2]
        kept = min(queries, Q)
        angles = None if self.angles is None else self.angles.last(kept)
        terms = self.terms.queries(Q - kept, Q)
        return Attended(self.number, self.query_BHQD[:, :, Q - kept :], terms, angles, self.layer)

    def chunks(self) -> Iterator[Chunk]:
        """All keys, from host memory, as many at a time as these queries may have logits for."""
        most = max(LOGITS_BYTES // (4 * self.query_BHQD[..., 0].numel()), LEAST_TOKENS)
        for chunk in chunks(self.layer.blocks, self.query_BHQD):
            yield from split(chunk, most)

    def probabilities(self, start: int, key_BGTD: Tensor, total_BHQ1: Tensor) -> Tensor:
        """Softmax probabilities of some tokens from ``start`` on, fp32 ``[B, H, Q, T]``.

        Args:
            total_BHQ1: Log-sum-exp of all logits (``dense.total_of``).
        """
        logits_BHQT = scaled_logits(self.query_BHQD, key_BGTD, self.terms)
        (Q, T), mask = logits_BHQT.shape[-2:], self.terms.mask
        if mask is not None and mask.dim() == 4:
            part = mask[..., start : start + T]
            logits_BHQT = logits_BHQT.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits_BHQT + part
        else:
            query_Q1 = torch.arange(self.length - Q, self.length, device=key_BGTD.device)[:, None]
            token_T = torch.arange(start, start + T, device=key_BGTD.device)
            logits_BHQT = logits_BHQT.masked_fill(token_T > query_Q1, -torch.inf)
        return torch.exp(logits_BHQT - total_BHQ1)


@contextmanager
def watching(model: PreTrainedModel, cache: Cache, see: Callable[[Attended], None]) -> Iterator[None]:
    """Call ``see`` after every attention over an offloaded layer of this cache; sequences must have no padding.

    The model's results do not change. Within the block, a forward stores the rotation of one layer's next attention
    call at a time.
    """
    given: dict[int, _Given] = {}
    with ExitStack() as stack:
        for module in model.modules():
            number = getattr(module, "layer_idx", None)
            if isinstance(number, int):
                note = given.setdefault(number, _Given())
                handle = module.register_forward_pre_hook(note.take_angles, with_kwargs=True)
                stack.callback(handle.remove)
                source = getattr(module, "q_norm", None) or getattr(module, "q_proj", None)
                if isinstance(source, nn.Module):
                    stack.callback(source.register_forward_hook(note.take_queries).remove)
        for layer in cache.layers:
            if isinstance(layer, TieredLayer):
                note = given.setdefault(layer.number, _Given())
                layer.attend = partial(_attend, layer, layer.attend, note, see)  # type: ignore[method-assign]
                stack.callback(layer.__dict__.pop, "attend")
        yield


@dataclass
class _Given:
    """Inputs of a layer's next attention call."""

    angles: Angles | None = None
    queries: Tensor | None = None

    def take_angles(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        angles = kwargs.get("position_embeddings")
        if isinstance(angles, tuple) and len(angles) == 2:
            self.angles = Angles(module, *angles)

    def take_queries(self, module: nn.Module, args: tuple[Any, ...], queries: Tensor) -> None:
        self.queries = queries

    def taken(self, query_BHQD: Tensor) -> Angles | None:
        """By what these queries were rotated; forgets it all."""
        angles, before = self.angles, self.queries
        self.angles = self.queries = None
        return None if _same_last(before, query_BHQD) else angles


def _same_last(before: Tensor | None, query_BHQD: Tensor) -> bool:
    """Whether the last token's queries are what the projection, or the norm behind it, made: nothing was rotated."""
    B, H, Q, D = query_BHQD.shape
    if before is None or before.numel() != query_BHQD.numel():
        return False
    return torch.equal(before.reshape(B, Q, H, D)[:, -1], query_BHQD[:, :, -1])


def _attend(
    layer: TieredLayer,
    attend: Callable[..., Tensor],
    note: _Given,
    see: Callable[[Attended], None],
    query_BHQD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    terms: Terms,
) -> Tensor:
    out_BHQD = attend(query_BHQD, key_BGTD, value_BGTD, terms)
    see(Attended(layer.number, query_BHQD, terms, note.taken(query_BHQD), layer))
    return out_BHQD
