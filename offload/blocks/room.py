"""Room: how much host memory caches need, checked before any work and allocated in parallel to it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import HostMemoryError
from attention_predictor.offload.blocks.available_memory import available_memory
from attention_predictor.offload.blocks.block_codec import stored_bytes
from attention_predictor.offload.blocks.host_memory import SPARE_BYTES, HostMemory, aligned
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.ranks import Ranks
from attention_predictor.sizes import size_text

logger = logging.getLogger(__name__)
GROWTH = 4096  # tokens that captured steps reserve ahead; when they are used up, steps are captured again


class KVShape(NamedTuple):
    """The shape of one token's keys or values in one layer, of this rank's KV heads."""

    kv_heads: int
    head_dim: int
    itemsize: int


class Growing(Protocol):
    """A cache to which memory may be promised."""

    @property
    def room(self) -> int:
        """Tokens that allocated host memory can hold."""
        ...


class Room:
    """Host memory of an engine's caches: how much they need, whether it fits, and its allocation.

    All figures are this rank's own; whether a cache fits is decided by all ranks together.

    Attributes:
        shapes: KV shape of each tiered layer; ``None`` until its first tensors show it.
        captures: Whether steps may be captured, which reserves memory ahead.
        settle: Returns when no fetch is in progress.
    """

    def __init__(
        self,
        config: OffloadConfig,
        memory: HostMemory,
        shapes: dict[int, KVShape | None],
        ranks: Ranks,
        *,
        captures: bool,
    ) -> None:
        self.config, self.memory, self.shapes, self.captures = config, memory, shapes, captures
        self.ranks = ranks
        self.slab_tokens = config.slab_blocks * config.block_size
        self.settle: Callable[[], None] = lambda: None
        self._tight = False  # too little memory to reserve GROWTH tokens
        # By living cache: its sequences, and the tokens that each will have.
        self._promises: WeakKeyDictionary[Growing, tuple[int, int]] = WeakKeyDictionary()

    def set_shape(self, number: int, shape: KVShape) -> None:
        """Set a layer's KV shape, found from its first tensors."""
        self.shapes[number] = shape

    def bytes_for(self, batch: int, tokens: int) -> int:
        """Bytes of a cache of these sequences, in whole slabs, over layers of known shape."""
        return self.slab_bytes(batch, tokens) + sum(aligned(batch * self._open_bytes(one)) for one in self._known())

    def slab_bytes(self, batch: int, tokens: int) -> int:
        """Those of slabs alone, which copies share: each has the block that it is writing for itself."""
        slabs = batch * ceil_div(tokens, self.slab_tokens)
        return sum(slabs * aligned(self._slab_bytes(one)) for one in self._known())

    def _known(self) -> list[KVShape]:
        return [shape for shape in self.shapes.values() if shape is not None]

    def _slab_bytes(self, shape: KVShape) -> int:
        """Bytes of a slab of one sequence."""
        bits, size = self.config.code_bits, self.config.block_size
        blocks = shape.kv_heads * self.config.slab_blocks
        return blocks * stored_bytes(bits, size, shape.head_dim, shape.itemsize)

    def _open_bytes(self, shape: KVShape) -> int:
        """Bytes of the block of one sequence that is still being written, where it isn't in a slab."""
        if self.config.code_bits is None:
            return 0
        return shape.kv_heads * stored_bytes(None, self.config.block_size, shape.head_dim, shape.itemsize)

    def captured_tokens(self, tokens: int) -> int:
        """Tokens to reserve for captured steps that begin at ``tokens``: at least two more."""
        # With a limit on host memory, reserve no more than the next slab.
        growth = self.slab_tokens if self._tight or self.config.host_memory is not None else GROWTH
        return ((tokens + 2) // growth + 1) * growth

    def promise(self, cache: Growing, *, batch: int, tokens: int) -> None:
        """Keep ``host_memory`` for a cache's growth to ``tokens``: captured steps of others reserve none of it."""
        self._promises[cache] = batch, tokens

    def promised_beside(self, cache: Growing | None) -> int:
        """Bytes that caches, alive and promised to, will still take; other than this one."""
        others = [(one.room, *promise) for one, promise in self._promises.items() if one is not cache]
        return sum(max(self.bytes_for(batch, tokens) - self._held(batch, room), 0) for room, batch, tokens in others)

    def _held(self, batch: int, room: int) -> int:
        """Bytes of a cache that has room for these tokens."""
        return self.bytes_for(batch, room) if room else 0

    def why_not_ahead(self, *, batch: int, tokens: int, room: int, promised: int = 0) -> str | None:
        """Why ``host_memory`` lets captured steps that begin at ``tokens`` reserve no memory; ``None`` if it does.

        ``room``, ``promised``: as in ``check``.
        """
        if self.config.host_memory is None:
            return None
        ahead = self.captured_tokens(tokens)
        needed, limit = self.bytes_for(batch, ahead), self._allowed(batch, room) - promised
        if ahead <= room or needed <= limit:
            return None
        return (
            f"room for {batch} × {ahead} tokens is {size_text(needed)} of host memory: "
            f"host_memory allows {size_text(max(limit, 0))}"
        )

    def _allowed(self, batch: int, room: int) -> int:
        """Bytes that ``host_memory`` allows a cache that has room for these tokens, beside all other caches."""
        assert self.config.host_memory is not None
        return self.config.host_memory - (self.memory.lent_bytes - self._held(batch, room))

    def check(self, *, batch: int, tokens: int, room: int, promised: int = 0, settled: bool = False) -> None:
        """Refuse a cache that does not fit. Also decides how much memory captured steps reserve ahead.

        Args:
            batch, tokens: Sequences, and the length that each will have.
            room: Tokens for which the cache has slabs.
            promised: Bytes that other caches will still take. Negative: bytes that they will return.
            settled: No fetch in progress holds the memory of a dead cache.

        Raises:
            HostMemoryError: It would not fit in ``config.host_memory``, or in what the system has available, on this
                rank or on another one.
        """
        if tokens <= room:
            return
        with self.ranks.together():
            self._check(batch, tokens, room, promised, settled)
        self._tight = any(self.ranks.gather(self._tight))

    def _check(self, batch: int, tokens: int, room: int, promised: int, settled: bool) -> None:
        needed, (limit, source) = self.bytes_for(batch, tokens), self._limit(batch, room, promised)
        if needed > limit and not settled:
            self.settle()  # the last fetch of a cache that is dead may still hold its memory
            limit, source = self._limit(batch, room, promised)
        if self.config.host_memory is None:
            self._tight = self.captures and self.bytes_for(batch, (tokens // GROWTH + 1) * GROWTH + GROWTH) > limit
        if needed > limit:
            raise HostMemoryError(
                f"the KV cache of {batch} × {tokens} tokens needs {size_text(needed)} of host memory: "
                f"{source} {size_text(max(limit, 0))}"
            )

    def prepare(self, *, batch: int, tokens: int, room: int) -> None:
        """Start allocating, in the background, the memory that ``check`` found to fit."""
        if tokens <= room:
            return
        if self.captures and self.why_not_ahead(batch=batch, tokens=tokens, room=room) is None:
            tokens = self.captured_tokens(tokens)
        self._prepare(batch, tokens, room)

    def _limit(self, batch: int, room: int, promised: int) -> tuple[int, str]:
        """Bytes that a cache with room for these tokens may have in all, and who says so."""
        if self.config.host_memory is not None:
            return self._allowed(batch, room) - promised, "host_memory allows"
        share = (available_memory() - SPARE_BYTES) // self.ranks.on_host
        limit = share - self.memory.unready_bytes + self.memory.free_bytes + self._held(batch, room) - promised
        return limit, "the system has available"

    def prepare_growth(self, *, batch: int, room: int, promised: int) -> None:
        """Start allocating what captured steps will reserve when this room is used up, so that they need not wait then.

        If it can't be had now, the step that needs it says so.
        """
        tokens = self.captured_tokens(room - 1)  # from the length at which the room no longer suffices
        if self.bytes_for(batch, tokens) > self._limit(batch, room, promised)[0]:
            return
        try:
            self._prepare(batch, tokens, room)
        except (HostMemoryError, RuntimeError) as error:  # such as a limit on threads
            logger.info("no host memory is prepared for further steps: %s", error)

    def _prepare(self, batch: int, tokens: int, room: int) -> None:
        slabs = ceil_div(tokens, self.slab_tokens) - room // self.slab_tokens
        counts = Counter[int]()
        for shape in self._known():
            counts[self._slab_bytes(shape)] += batch * slabs
            if room == 0 and (nbytes := batch * self._open_bytes(shape)):
                counts[nbytes] += 1
        self.memory.prepare(sorted(counts.items(), reverse=True))
