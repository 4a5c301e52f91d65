"""Fills caches without a prefill, with synthetic keys that a model's queries attend to as they attend to real ones.

The queries are the model's own: those of the tokens to be decoded, at their positions, and of the 64 tokens before
them, from a run over these tokens only. Keys are noise, except for *spans*, a few hundred for each KV head. A span is a
run of tokens whose keys point along the query of one of these steps and one query head, so that its attention rises and
falls as fast as the model's queries change. Attention on spans falls off as a power of their rank. Trained models look
like this: a few places hold most of a head's attention and keep it for a while (re-access: TAPPA, ICLR 2026,
arXiv 2601.21709). The timings report the resulting query similarity, hit rate, reuse and fetched bytes.

A sliding-window layer gets noise, as many tokens as its cache keeps.

The same seed gives the same keys and values for every kind of cache, chunk by chunk; a long context is never on the
device as a whole unless the cache puts it there.

Suffixes: B sequences, G KV heads, H query heads, h query heads of one KV head, Q queries, X = h × Q, S spans, T tokens,
D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from attention_predictor.errors import ConfigError
from attention_predictor.eval.bench.resident_step import ResidentLayer
from attention_predictor.offload.attention.dense import ScoreRows, Terms, score_rows
from attention_predictor.offload.chunk import Chunk
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies.query_similarity import query_similarity

CHUNK = 4096  # tokens made at once, a multiple of every block size
PAST = 64  # queries before the first decoded one, which start a history


@dataclass(frozen=True, slots=True)
class Locality:
    """Shape of the attention over the synthetic keys.

    With the defaults and a model of ``shapes``, hit rate, reuse and the share of the budget that a step fetches are
    about those of the pocket model on books and documentation at budgets of 512 and 1,024 (docs/LOG.md).

    Attributes:
        spans: Spans of each KV head, together at most a quarter of the tokens.
        span_tokens: Tokens of a span, which begins in the middle of such a stretch: it lies in two blocks of 16.
        falloff: A span's attention at its time is proportional to rank ** −falloff.
        share: A head's attention on the spans, were all at their time at once; the rest is on the noise.
        noise: Standard deviation of the logits of all other keys.
    """

    spans: int = 256
    span_tokens: int = 16
    falloff: float = 1.0
    share: float = 0.8
    noise: float = 2.0


class QueryTap(TieredLayer):
    """A tiered layer that stores its last query."""

    query_BHQD: Tensor
    terms: Terms

    def attend(self, query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms) -> Tensor:
        self.query_BHQD, self.terms = query_BHQD, terms
        return super().attend(query_BHQD, key_BGTD, value_BGTD, terms)


@torch.no_grad()
def tap_queries(model: PreTrainedModel, ids_1Q: Tensor, first: int) -> list[QueryTap | DynamicSlidingWindowLayer]:
    """The layers of a cache after these tokens at the positions from ``first`` on, with nothing before them.

    Raises:
        ConfigError: A layer neither attends to the whole context nor slides a window over it.
    """
    with attach(model, OffloadConfig(policy="full")) as engine:
        cache, taps = engine.new_cache(), list[QueryTap | DynamicSlidingWindowLayer]()
        for number, layer in enumerate(cache.layers):
            if number in engine.tiered_layers:
                taps.append(QueryTap(engine.runtime, number))
            elif isinstance(layer, DynamicSlidingWindowLayer):
                taps.append(layer)
            else:
                raise ConfigError(
                    f"--synthetic: layer {number} of {type(model).__name__} keeps a {type(layer).__name__}: "
                    "only layers with full or sliding-window attention can be filled"
                )
        if not engine.tiered_layers:
            raise ConfigError(f"--synthetic: {type(model).__name__} has no layer that attends to the whole context")
        cache.layers = list(taps)
        position_1Q = torch.arange(first, first + ids_1Q.shape[1], device=ids_1Q.device)[None]
        model(ids_1Q, **with_cache(model, cache), position_ids=position_1Q, logits_to_keep=1)
    return taps


class SyntheticCache:
    """Keys and values of ``length`` tokens in each layer of a model.

    Args:
        model: A model whose layers attend to the whole context or to a window.
        ids_1Q: The last ``PAST`` tokens of the prompt, then the tokens to decode.
        length: Tokens of the prompt.
        batch: Sequences, each with keys and values of its own.

    Raises:
        ConfigError: The model has other layers, or the prompt is shorter than ``PAST`` tokens.

    Attributes:
        queries: query_1HQD of each layer that attends to the whole context, by its number.
        windows: Tokens that each other layer looks back, by its number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids_1Q: Tensor,
        length: int,
        *,
        batch: int = 1,
        seed: int = 0,
        locality: Locality | None = None,
    ) -> None:
        if length < PAST:
            raise ConfigError(f"--synthetic: expected a prompt of at least {PAST} tokens, found {length}")
        self.length, self.batch, self.seed = length, batch, seed
        self.locality = locality or Locality()
        self.device, self.dtype = model.device, model.dtype
        taps = tap_queries(model, ids_1Q, length - PAST)
        self.queries: dict[int, Tensor] = {}
        self.terms: dict[int, Terms] = {}
        self.windows: dict[int, int] = {}
        self._heads: dict[int, tuple[int, int]] = {}  # KV heads and head size
        for number, tap in enumerate(taps):
            if isinstance(tap, QueryTap):
                self.queries[number] = tap.query_BHQD.cpu()
                self.terms[number] = Terms(tap.terms.scaling, tap.terms.softcap, tap.terms.sinks_H)
                self._heads[number] = tap.kv_heads, tap.head_dim
            else:
                assert tap.keys is not None  # the run has filled it
                self.windows[number] = tap.sliding_window
                self._heads[number] = tap.keys.shape[1], tap.keys.shape[3]

    def query_similarity(self) -> float:
        """Mean cosine of the queries of any two steps, over heads and layers (q-similarity, arXiv 2601.21709)."""
        return float(torch.stack([query_similarity(query_1HQD) for query_1HQD in self.queries.values()]).mean())

    def chunks(self, number: int) -> Iterator[Chunk]:
        """Keys and values of a layer that attends to the whole context, on the device; the same at every call."""
        G, D = self._heads[number]
        query_GhQD = self.queries[number][0].to(self.device).float().unflatten(0, (G, -1))
        made = self._random(number)
        scaling = self.terms[number].scaling
        token_BGST, key_BGSD = self._spans(query_GhQD, scaling, made)
        noise_G11 = (self.locality.noise / (scaling * query_GhQD.norm(dim=-1).mean((1, 2))))[:, None, None]
        for start in range(0, self.length, CHUNK):
            shape = (self.batch, G, min(CHUNK, self.length - start), D)
            key_BGTD = torch.randn(shape, **made) * noise_G11
            b, g, s, t = ((token_BGST >= start) & (token_BGST < start + shape[2])).nonzero(as_tuple=True)
            key_BGTD[b, g, token_BGST[b, g, s, t] - start] += key_BGSD[b, g, s]
            yield Chunk(start, key_BGTD.to(self.dtype), torch.randn(shape, **made).to(self.dtype))

    def _random(self, number: int) -> dict[str, Any]:
        """How random numbers of a layer are made: the same at every call."""
        generator = torch.Generator(self.device).manual_seed((self.seed << 16 | number) % 2**63)
        return {"generator": generator, "device": self.device}

    def _spans(self, query_GhQD: Tensor, scaling: float, made: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The spans' tokens, by rank and disjoint within a KV head, and the vectors added to their keys."""
        look, B, G, D = self.locality, self.batch, query_GhQD.shape[0], query_GhQD.shape[3]
        offset = look.span_tokens // 2
        cells = (self.length - offset) // look.span_tokens
        spans = min(look.spans, max(1, cells // 4))
        cell_BGS = torch.rand(B, G, cells, **made).topk(spans).indices
        inner_T = torch.arange(offset, offset + look.span_tokens, device=self.device)
        token_BGST = cell_BGS[..., None] * look.span_tokens + inner_T

        query_GXD = query_GhQD.flatten(1, 2)
        which_BGS1 = torch.randint(query_GXD.shape[1], (B, G, spans, 1), **made)
        liked_BGSD = query_GXD.expand(B, -1, -1, -1).gather(2, which_BGS1.expand(-1, -1, -1, D))
        # The noise, of which exp(logit) has mean exp(noise² / 2), and the spans' logits must give the share asked for.
        odds = math.log(look.share / (1 - look.share)) + math.log(self.length) + look.noise**2 / 2
        weight_S = torch.arange(1, spans + 1, device=self.device).float() ** -look.falloff
        logit_S1 = odds + (weight_S / (look.span_tokens * weight_S.sum())).log()[:, None]
        return token_BGST, liked_BGSD * logit_S1 / (scaling * liked_BGSD.square().sum(-1, keepdim=True))

    @torch.no_grad()
    def fill(self, cache: Cache) -> None:
        """Put all tokens into an empty cache: ours, or a stock one."""
        if (tiered := next((one for one in cache.layers if isinstance(one, TieredLayer)), None)) is not None:
            # As a forward does: slabs lent without it are allocated one by one.
            tiered.runtime.room.prepare(batch=self.batch, tokens=self.length, room=0)
        for number, layer in enumerate(cache.layers[: len(self._heads)]):
            if isinstance(layer, TieredLayer):
                self._fill_tiered(layer, number)
            elif isinstance(layer, ResidentLayer):
                for chunk in self.chunks(number):
                    layer.update(chunk.key_BGTD, chunk.value_BGTD)
            elif number in self.queries:
                _, keys, values = zip(*self.chunks(number), strict=True)
                cache.update(torch.cat(keys, 2), torch.cat(values, 2), number)
            else:
                self._fill_window(layer, number)

    def _fill_window(self, layer: Any, number: int) -> None:
        """Set a sliding-window layer as a prefill leaves it: filled with the last tokens, all tokens counted.

        Args:
            layer: One of transformers', with a window, or static and with room for the whole context.
        """
        G, D = self._heads[number]
        kept = min(self.length, self.windows[number])
        made = self._random(number)
        key_BGTD, value_BGTD = (torch.randn((self.batch, G, kept, D), **made).to(self.dtype) for _ in range(2))
        if not layer.is_sliding:  # it holds all tokens; no step reads those before the window
            earlier = (0, 0, self.length - kept, 0)
            key_BGTD, value_BGTD = (torch.nn.functional.pad(part, earlier) for part in (key_BGTD, value_BGTD))
        layer.update(key_BGTD, value_BGTD)
        if layer.is_sliding:  # a static one counts on the host under a name of its own
            count = "cumulative_length_int" if hasattr(layer, "cumulative_length_int") else "cumulative_length"
            setattr(layer, count, self.length)

    def _fill_tiered(self, layer: TieredLayer, number: int) -> None:
        """Set the layer as a prefill leaves it: keys stored, policy updated, first fetch started.

        A policy that wants to see more than ``PAST`` rows of the prompt (``prompt_rows``) sees so many: what it
        remembers is as large, and steps take as long.
        """
        past_BHQD = self.queries[number][:, :, :PAST].to(self.device).expand(self.batch, -1, -1, -1)

        def stored() -> Iterator[Chunk]:
            for chunk in self.chunks(number):
                layer.update(chunk.key_BGTD, chunk.value_BGTD)
                layer.store(chunk.key_BGTD, chunk.value_BGTD, past_BHQD)
                layer.awaits_attention = False  # this update is not followed by an attention call
                yield chunk

        shape = {"kv_heads": self._heads[number][0], "block_size": layer.block_size}
        rows = score_rows(past_BHQD, stored(), self.length, self.terms[number], **shape)
        if wanted := layer.policy.prompt_rows:
            layer.policy.observe_rows(ScoreRows(*(rows_BGQN[:, :, -wanted:] for rows_BGQN in rows)))
        allocation = layer.prompt_allocation
        if allocation is not None and allocation.applies_to(PAST, self.length):
            allocation.record(layer, past_BHQD, rows, None)  # the last layer's call sets all budgets and starts fetches
        else:
            layer._fetch_ahead()
            layer.note_memory()
