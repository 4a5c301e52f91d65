"""Room: how much host memory caches will take, asked before any work is done, and made beside it.

Suffixes: none; all counts are of tokens, slabs or bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import HostMemoryError
from attention_predictor.offload.blocks.available_memory import available_memory
from attention_predictor.offload.blocks.host_memory import SPARE_BYTES, HostMemory
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.sizes import size_text

GROWTH = 4096  # tokens by which captured steps have more room than they need: then they are captured anew


class KVShape(NamedTuple):
    """What a token takes in one layer: keys and values of so many heads."""

    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.itemsize


class Room:
    """Host memory of an engine's caches: what they need, whether it fits, and its preparation.

    Attributes:
        shapes: Of each tiered layer; ``None`` where only its first tensors will tell.
        captures: Whether steps may be captured, which takes more room ahead.
    """

    def __init__(
        self, config: OffloadConfig, memory: HostMemory, shapes: dict[int, KVShape | None], *, captures: bool
    ) -> None:
        self.config, self.memory, self.shapes, self.captures = config, memory, shapes, captures
        self.slab_tokens = config.slab_blocks * config.block_size
        self._tight = False  # too little memory for all of GROWTH

    def learn(self, number: int, shape: KVShape) -> None:
        """What a layer's first tensors have shown."""
        self.shapes[number] = shape

    def bytes_for(self, batch: int, tokens: int) -> int:
        """What a cache of these sequences takes, in whole slabs; of the layers whose shape is known."""
        slabs = ceil_div(tokens, self.slab_tokens)
        known = (shape for shape in self.shapes.values() if shape is not None)
        return sum(batch * slabs * self.slab_tokens * shape.token_bytes for shape in known)

    def captured(self, tokens: int) -> int:
        """Tokens that captured steps have room for if they begin at so many: two more at least, the next one's too."""
        # A limit on host memory is kept to the slab.
        growth = self.slab_tokens if self._tight or self.config.host_memory is not None else GROWTH
        return ((tokens + 2) // growth + 1) * growth

    def check(self, *, batch: int, tokens: int, room: int) -> None:
        """Refuse what does not fit. The answer also decides how much room captured steps take ahead.

        Args:
            batch, tokens: Sequences, and the length that each will have.
            room: Tokens for which the cache has slabs.

        Raises:
            HostMemoryError: It would not fit in ``config.host_memory``, or in what the system has available.
        """
        if tokens <= room:
            return
        needed = self.bytes_for(batch, tokens)
        own = self.bytes_for(batch, room) if room else 0
        if self.config.host_memory is not None:
            limit = self.config.host_memory - (self.memory.lent_bytes - own)
            source = "host_memory allows"
        else:
            limit = available_memory() - SPARE_BYTES - self.memory.unready_bytes + self.memory.free_bytes + own
            source = "the system has available"
            self._tight = self.captures and self.bytes_for(batch, (tokens // GROWTH + 1) * GROWTH + GROWTH) > limit
        if needed > limit:
            raise HostMemoryError(
                f"the KV cache of {batch} × {tokens} tokens needs {size_text(needed)} of host memory: "
                f"{source} {size_text(max(limit, 0))}"
            )

    def prepare(self, *, batch: int, tokens: int, room: int) -> None:
        """Begin to make what ``check`` has found to fit, beside the forward that will need it."""
        if tokens <= room:
            return
        if self.captures:
            tokens = self.captured(tokens)
        slabs = ceil_div(tokens, self.slab_tokens) - room // self.slab_tokens
        sizes = [batch * self.slab_tokens * shape.token_bytes for shape in self.shapes.values() if shape is not None]
        self.memory.prepare([(size, slabs * sizes.count(size)) for size in sorted(set(sizes), reverse=True)])
