"""Attention over all keys, one chunk at a time, for prefill, later turns and references.

Cached keys and values come as an iterator of chunks, so a cache in host memory is never on the device as a whole. Each
chunk gives a ``Piece``: by a fused kernel if one applies (``fused.py``), else by torch operations, which support every
mask. Pieces are merged by their log-sum-exp (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens of a chunk, D head size, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import ops
from attention_predictor.offload.attention import fused
from attention_predictor.offload.attention.fused import Piece
from attention_predictor.offload.chunk import LOGITS_TOKENS, Chunk, split
from attention_predictor.predictor.scores import block_peak_and_sum

# Most bytes of fp32 logits that the torch operations hold at once, for at most ``LOGITS_TOKENS`` tokens.
LOGITS_BYTES = 1 << 27
# Most elements of a mask of queries by keys. Longer prompts are computed sequence by sequence, or by torch operations.
MASK_ELEMENTS = 1 << 24
# Fewer keys are not worth a fused kernel, and some kernels don't support so few.
MIN_FUSED_TOKENS = 64
# Log-sum-exp of no key at all; finite, so that the difference of two is finite.
NOTHING = -1e30


@dataclass(frozen=True, slots=True)
class Terms:
    """How logits follow from queries and keys, and which keys a query may attend to.

    Attributes:
        scaling: Factor on q·k.
        softcap: Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), or ``None``.
        sinks_H: Logit of an extra softmax column without a value, per head (GPT-OSS), or ``None``.
        mask: ``None`` (causal), bool ``[B, length]`` (causal, and True where the key is no padding), or
            ``[B, 1 or H, Q, length]``, bool (True where allowed) or additive.
    """

    scaling: float
    softcap: float | None = None
    sinks_H: Tensor | None = None
    mask: Tensor | None = None

    def queries(self, low: int, high: int) -> Terms:
        """The terms of queries ``low`` to ``high``."""
        if self.mask is None or self.mask.dim() == 2:
            return self
        return replace(self, mask=self.mask[:, :, low:high])


class ScoreRows(NamedTuple):
    """Softmax probabilities of some queries, reduced to blocks (see ``predictor/scores.py``)."""

    scores_BGQN: Tensor
    mass_BGQN: Tensor


# ---- attention ---------------------------------------------------------------------------------------------------


def attend_prompt(
    query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, terms: Terms, *, causal: bool = True
) -> Tensor:
    """Attention of the last Q of T tokens that are all on the device; by torch's own function where possible.

    ``causal=False``: each query may attend to every key that the mask allows.
    """
    B, H, Q, _ = query_BHQD.shape
    length, mask = key_BGTD.shape[2], terms.mask
    if not causal and (mask is None or mask.dim() == 2):
        seen_B11L = mask[:, None, None] if mask is not None else torch.ones_like(key_BGTD[:, :1, None, :, 0]).bool()
        mask = seen_B11L.expand(-1, -1, Q, -1)
        terms = replace(terms, mask=mask)
    plain = terms.softcap is None and terms.sinks_H is None
    if mask is None:
        # torch's is_causal aligns at the top left, which is wrong after cached tokens.
        ours = Q not in (1, length) or fused.takes_flash_attn(query_BHQD)
    else:
        ours = mask.dim() == 2 and B * Q * length > MASK_ELEMENTS
    if ours or not plain:
        return attend(query_BHQD, Chunk(0, key_BGTD, value_BGTD), terms)
    if mask is not None and mask.dim() == 2:
        causal_QL = torch.ones(Q, length, dtype=torch.bool, device=mask.device).tril(length - Q)
        mask = causal_QL & mask[:, None, None]
    groups = H // key_BGTD.shape[1]
    if mask is not None and groups > 1:  # with a mask, fused CUDA kernels need repeated heads
        key_BGTD, value_BGTD = key_BGTD.repeat_interleave(groups, 1), value_BGTD.repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(
        query_BHQD,
        key_BGTD,
        value_BGTD,
        attn_mask=mask,
        is_causal=mask is None and Q > 1,
        scale=terms.scaling,
        enable_gqa=mask is None and groups > 1,
    )


def attend(query_BHQD: Tensor, own: Chunk, terms: Terms, past: Iterable[Chunk] = ()) -> Tensor:
    """Softmax attention of the last Q tokens of ``own``, to ``own`` and to earlier tokens, in the chunks ``past``.

    Returns:
        ``[B, H, Q, D]`` in the dtype of the query; zeros for a query without visible keys.
    """
    first_query = own.end - query_BHQD.shape[2]
    unpadded = _unpadded(terms.mask) if why_not_fused(query_BHQD, own.key_BGTD, terms) is None else None
    parts = unpadded or [_Part(slice(None), 0)]
    for chunk in chain(past, (own.tokens(own.start, first_query), own.tokens(first_query, own.end))):
        for part in parts if chunk.end > chunk.start else ():
            if unpadded:
                piece = _fused(query_BHQD, chunk, first_query, terms, part)
            else:
                piece = _plain(query_BHQD, chunk, first_query, terms)
            part.so_far = merge(part.so_far, piece)
    return _joined(query_BHQD, parts, first_query, terms.sinks_H)


def why_not_fused(query_BHQD: Tensor, key_BGTD: Tensor, terms: Terms) -> str | None:
    """Why ``attend`` must use torch operations, or ``None``. Padding that is not on the left is found only there."""
    if terms.mask is not None and terms.mask.dim() == 4:
        return "the model gives a mask of its own"
    return fused.why_no_kernel(query_BHQD, key_BGTD, terms.softcap)


def merge(one: Piece | None, other: Piece | None) -> Piece | None:
    """Attention to the keys of both pieces, which must be disjoint; ``None`` stands for no keys."""
    if one is None or other is None:
        return one or other
    share_BHQ = torch.sigmoid(other.lse_BHQ - one.lse_BHQ)  # the other piece's share of the softmax weight
    out_BHQD = torch.lerp(one.out_BHQD.float(), other.out_BHQD.float(), share_BHQ[..., None])
    return Piece(out_BHQD, torch.logaddexp(one.lse_BHQ, other.lse_BHQ))


@dataclass
class _Part:
    """Sequences that are computed together, without their padding, the tokens before ``first``."""

    sequences: slice
    first: int
    so_far: Piece | None = None


def _unpadded(mask: Tensor | None) -> list[_Part] | None:
    """Parts whose attention needs no mask; ``None`` if padding is not only on the left."""
    if mask is None:
        return [_Part(slice(None), 0)]
    # The only place where a prompt waits for the device: kernels need the sizes on the host.
    first_and_real = torch.stack([mask.int().argmax(-1), mask.sum(-1)], -1).tolist()
    length = mask.shape[1]
    if any(real and first + real != length for first, real in first_and_real):
        return None
    return [_Part(slice(row, row + 1), length - real) for row, (_, real) in enumerate(first_and_real)]


def _fused(query_BHQD: Tensor, chunk: Chunk, first_query: int, terms: Terms, part: _Part) -> Piece | None:
    """Attention of a part's queries to a chunk by a kernel. The chunk lies before the queries, or is theirs."""
    low = max(part.first - first_query, 0)
    query_BHQD = query_BHQD[part.sequences, :, low:]
    keys = Chunk(chunk.start, chunk.key_BGTD[part.sequences], chunk.value_BGTD[part.sequences])
    keys = keys.tokens(part.first, chunk.end)
    tokens = keys.end - keys.start
    if tokens == 0:
        return None
    piece = None
    if tokens >= MIN_FUSED_TOKENS:
        form = (query_BHQD, keys.key_BGTD, keys.value_BGTD, terms.scaling, terms.softcap)
        piece = fused.attend_piece(*form, causal=keys.start >= first_query)
    return piece or _plain(query_BHQD, keys, first_query + low, replace(terms, mask=None))


def _plain(query_BHQD: Tensor, chunk: Chunk, first_query: int, terms: Terms) -> Piece:
    """Attention to a chunk by torch operations, in tiles of queries and keys that bound the logits' size."""
    B, H, Q, _ = query_BHQD.shape
    rows = max(LOGITS_BYTES // (4 * B * H * min(chunk.end - chunk.start, LOGITS_TOKENS)), 1)
    pieces = []
    for low in range(0, Q, rows):
        high = min(low + rows, Q)
        piece: Piece | None = None
        for keys in split(chunk, LOGITS_TOKENS):
            hidden = keys.start >= first_query + high and (terms.mask is None or terms.mask.dim() == 2)
            if piece is None or not hidden:
                tile = _tile(query_BHQD[:, :, low:high], keys, first_query + low, terms.queries(low, high))
                piece = merge(piece, tile)
        assert piece is not None
        pieces.append(piece)
    return Piece(*(torch.cat(x, 2) for x in zip(*pieces, strict=True)))


def _tile(query_BHQD: Tensor, keys: Chunk, first_query: int, terms: Terms) -> Piece:
    logits_BHQT = _masked(scaled_logits(query_BHQD, keys.key_BGTD, terms), keys.start, first_query, terms.mask)
    peak_BHQ1 = logits_BHQT.amax(-1, keepdim=True)
    # A query without visible keys has a peak of -inf; use 0, so that exp gives 0 and not nan.
    peak_BHQ1 = peak_BHQ1.masked_fill(peak_BHQ1 == float("-inf"), 0.0)
    weight_BHQT = torch.exp(logits_BHQT - peak_BHQ1)
    total_BHQ1 = weight_BHQT.sum(-1, keepdim=True)
    at_least = total_BHQ1.clamp_min(torch.finfo(torch.float32).tiny)
    grouped_BGNT = weight_BHQT.unflatten(1, (keys.value_BGTD.shape[1], -1)).flatten(2, 3)
    out_BHQD = _product(grouped_BGNT, keys.value_BGTD).view(query_BHQD.shape) / at_least
    lse_BHQ1 = (peak_BHQ1 + at_least.log()).masked_fill(total_BHQ1 == 0, NOTHING)
    return Piece(out_BHQD, lse_BHQ1[..., 0])


def _joined(query_BHQD: Tensor, parts: list[_Part], first_query: int, sinks_H: Tensor | None) -> Tensor:
    """The output of all parts, with sinks applied; zeros for queries in no part."""
    outs = []
    for part in parts:
        piece = part.so_far
        if piece is not None and sinks_H is not None:  # one more column, with a value of zero
            share_BHQ = torch.sigmoid(piece.lse_BHQ - sinks_H.float().view(1, -1, 1))
            piece = Piece(piece.out_BHQD * share_BHQ[..., None], piece.lse_BHQ)
        if piece is not None and piece.out_BHQD.shape == query_BHQD.shape:
            return piece.out_BHQD.to(query_BHQD.dtype)
        outs.append(piece)
    out_BHQD = torch.zeros_like(query_BHQD)
    for part, piece in zip(parts, outs, strict=True):
        if piece is not None:
            out_BHQD[part.sequences, :, max(part.first - first_query, 0) :] = piece.out_BHQD.to(query_BHQD.dtype)
    return out_BHQD


# ---- logits and rows of scores -----------------------------------------------------------------------------------


def scaled_logits(query_BHQD: Tensor, key_BGTD: Tensor, terms: Terms) -> Tensor:
    """fp32 ``[B, H, Q, T]`` logits before any mask; keys are not repeated for the query heads of a KV head."""
    logits_BHQT = _products(query_BHQD, key_BGTD).mul_(terms.scaling)
    if terms.softcap is not None:
        logits_BHQT = terms.softcap * torch.tanh(logits_BHQT / terms.softcap)
    return logits_BHQT


def _products(query_BHQD: Tensor, key_BGTD: Tensor) -> Tensor:
    """fp32 ``[B, H, Q, T]`` products of queries and keys."""
    B, H, Q, D = query_BHQD.shape
    grouped_BGND = query_BHQD.reshape(B, key_BGTD.shape[1], -1, D)
    return _product(grouped_BGND, key_BGTD.transpose(-1, -2)).view(B, H, Q, -1)


def total_of(sum_BHQN: Tensor, terms: Terms) -> Tensor:
    """Log-sum-exp of all logits, fp32 ``[B, H, Q, 1]``, from each block's; includes attention sinks."""
    total_BHQ1 = torch.logsumexp(sum_BHQN, -1, keepdim=True)
    if terms.sinks_H is None:
        return total_BHQ1
    return torch.logaddexp(total_BHQ1, terms.sinks_H.float().view(1, -1, 1, 1))


class Scorer:
    """True block scores and mass of the last Q of ``length`` tokens, from every key, added chunk by chunk.

    The matrix of queries by keys is never whole: a chunk adds one maximum and one log-sum-exp per block, two fp32
    numbers for each query, query head and block. With ``kernel``, on a GPU, one pass reduces logits to these.
    """

    @torch.no_grad()
    def __init__(
        self, query_BHQD: Tensor, length: int, terms: Terms, *, kv_heads: int, block_size: int, kernel: bool = False
    ) -> None:
        B, H, Q, _ = query_BHQD.shape
        whole_mask = terms.mask is not None and terms.mask.dim() == 4
        self.kernel = kernel and not whole_mask and ops.reduces(query_BHQD.device, block_size)
        self.query_BHQD, self.first_query, self.terms = query_BHQD, length - Q, terms
        self.kv_heads, self.block_size = kv_heads, block_size
        shape = (B, H, Q, ceil_div(length, block_size))
        self.peak_BHQN = query_BHQD.new_full(shape, float("-inf"), dtype=torch.float32)
        self.sum_BHQN = torch.full_like(self.peak_BHQN, float("-inf"))

    @torch.no_grad()
    def add(self, chunk: Chunk) -> None:
        """Add a chunk of keys, each key once."""
        size = self.block_size
        max_tokens = min(LOGITS_BYTES // (4 * self.query_BHQD[..., 0].numel()), LOGITS_TOKENS)
        for keys in split(chunk, max(max_tokens // size, 1) * size):
            if self.kernel:
                self._reduce(keys)
                continue
            logits_BHQT = scaled_logits(self.query_BHQD, keys.key_BGTD, self.terms)
            logits_BHQT = _masked(logits_BHQT, keys.start, self.first_query, self.terms.mask)
            first, short = divmod(keys.start, size)
            if short:  # the block began in another chunk
                logits_BHQT = torch.nn.functional.pad(logits_BHQT, (short, 0), value=float("-inf"))
            peak_BHQN, sum_BHQN = block_peak_and_sum(logits_BHQT, size)
            blocks = slice(first, first + peak_BHQN.shape[-1])
            torch.maximum(self.peak_BHQN[..., blocks], peak_BHQN, out=self.peak_BHQN[..., blocks])
            torch.logaddexp(self.sum_BHQN[..., blocks], sum_BHQN, out=self.sum_BHQN[..., blocks])

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yield the same chunks, adding each first."""
        for chunk in chunks:
            self.add(chunk)
            yield chunk

    @torch.no_grad()
    def rows(self) -> ScoreRows:
        """The score rows, after all keys were added. Call it once: it overwrites the sums."""
        total_BHQ1 = total_of(self.sum_BHQN, self.terms)
        total_BHQ1 = total_BHQ1.masked_fill(total_BHQ1 == float("-inf"), 0.0)
        scores_BHQN, mass_BHQN = (x.sub_(total_BHQ1).exp_() for x in (self.peak_BHQN, self.sum_BHQN))
        heads = (self.kv_heads, -1)
        return ScoreRows(scores_BHQN.unflatten(1, heads).amax(2), mass_BHQN.unflatten(1, heads).mean(2))

    def _reduce(self, keys: Chunk) -> None:
        terms = self.terms
        ops.reduce_logits(
            _products(self.query_BHQD, keys.key_BGTD),
            self.peak_BHQN,
            self.sum_BHQN,
            None if terms.mask is None else terms.mask.contiguous(),
            keys.start,
            self.first_query,
            self.block_size,
            terms.scaling,
            terms.softcap or 0.0,
        )


def score_rows(
    query_BHQD: Tensor, chunks: Iterable[Chunk], length: int, terms: Terms, *, kv_heads: int, block_size: int
) -> ScoreRows:
    """True score rows of the last Q of ``length`` tokens, in one pass over the keys (``Scorer``)."""
    scorer = Scorer(query_BHQD, length, terms, kv_heads=kv_heads, block_size=block_size)
    for chunk in chunks:
        scorer.add(chunk)
    return scorer.rows()


def _product(one_BGMK: Tensor, other_BGKN: Tensor) -> Tensor:
    """fp32 matrix product. On a GPU with half-precision keys, ``one_BGMK`` is rounded to theirs, for tensor cores."""
    half = other_BGKN.dtype in (torch.float16, torch.bfloat16)
    if one_BGMK.is_cuda and half and not torch.is_grad_enabled():
        pair = (one_BGMK.to(other_BGKN.dtype).flatten(0, 1), other_BGKN.flatten(0, 1))
        return torch.bmm(*pair, out_dtype=torch.float32).unflatten(0, one_BGMK.shape[:2])
    return one_BGMK.float() @ other_BGKN.float()


def _masked(logits_BHQT: Tensor, first_key: int, first_query: int, mask: Tensor | None) -> Tensor:
    """Mask keys that a query may not attend to; ``first_key``, ``first_query``: positions in the sequence."""
    Q, T = logits_BHQT.shape[-2:]
    if mask is not None and mask.dim() == 4:
        part = mask[..., first_key : first_key + T]
        return logits_BHQT.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits_BHQT + part
    if first_key + T > first_query + 1:  # some query comes before some key of this chunk
        query_Q1 = torch.arange(first_query, first_query + Q, device=logits_BHQT.device)[:, None]
        key_T = torch.arange(first_key, first_key + T, device=logits_BHQT.device)
        logits_BHQT = logits_BHQT.masked_fill(key_T > query_Q1, float("-inf"))
    if mask is not None:
        logits_BHQT = logits_BHQT.masked_fill(~mask[:, None, None, first_key : first_key + T], float("-inf"))
    return logits_BHQT
