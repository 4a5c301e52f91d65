"""Chunk: keys and values of consecutive tokens, as read from host memory and passed to attention.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# Most tokens of a chunk. Merging one costs a query about as much as attention to a few hundred keys.
CHUNK_TOKENS = 16384
# Most tokens whose logits the torch operations hold at once; also the smallest chunk, except for the last.
LOGITS_TOKENS = 4096


class Chunk(NamedTuple):
    """Keys and values of tokens ``start`` to ``start + T``."""

    start: int
    key_BGTD: Tensor
    value_BGTD: Tensor

    @property
    def end(self) -> int:
        return self.start + self.key_BGTD.shape[2]

    def tokens(self, start: int, end: int) -> Chunk:
        """The part of the chunk from token ``start`` to ``end`` of the sequence."""
        start = min(max(start, self.start), self.end)
        part = slice(start - self.start, max(end, start) - self.start)
        return Chunk(start, self.key_BGTD[:, :, part], self.value_BGTD[:, :, part])


def chunk_tokens(query_BHQD: Tensor) -> int:
    """Best chunk size for these queries: larger for many queries, whose merging is expensive."""
    return min(max(query_BHQD.shape[2], LOGITS_TOKENS), CHUNK_TOKENS)


def split(chunk: Chunk, tokens: int) -> Iterator[Chunk]:
    """Split a chunk at multiples of ``tokens``."""
    start = chunk.start
    while start < chunk.end:
        end = min((start // tokens + 1) * tokens, chunk.end)
        yield chunk.tokens(start, end)
        start = end
