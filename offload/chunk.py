"""Chunk: keys and values of some tokens, as they come from host memory and as attention takes them.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# Most tokens of a chunk. Merging a piece costs each query about as much as attention to a few hundred keys.
CHUNK_TOKENS = 16384
# Most tokens of which plain operations hold logits at once; a chunk has no fewer, unless there are no more.
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
        """The tokens that lie within these numbers, which count from the first of the sequence."""
        start = min(max(start, self.start), self.end)
        part = slice(start - self.start, max(end, start) - self.start)
        return Chunk(start, self.key_BGTD[:, :, part], self.value_BGTD[:, :, part])


def chunk_tokens(query_BHQD: Tensor) -> int:
    """Tokens that a chunk from host memory should have: many where many queries make merging dear."""
    return min(max(query_BHQD.shape[2], LOGITS_TOKENS), CHUNK_TOKENS)


def split(chunk: Chunk, tokens: int) -> Iterator[Chunk]:
    """The same in chunks that end where a multiple of so many tokens does."""
    start = chunk.start
    while start < chunk.end:
        end = min((start // tokens + 1) * tokens, chunk.end)
        yield chunk.tokens(start, end)
        start = end
