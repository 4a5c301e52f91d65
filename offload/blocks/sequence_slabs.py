"""SequenceSlabs: the pieces of host memory that one sequence's blocks lie in, some of them shared with its copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Lend = Callable[[], Tensor]  # gives a new slab, uninitialised; raises HostMemoryError


class SequenceSlabs(list[Tensor]):
    """Slabs ``[G, slab_blocks, z]`` of one sequence, in order (G: KV heads; z: dimensions of a stored block).

    Copies of a sequence share its complete slabs, which nobody writes: host memory holds a common prefix once.

    Attributes:
        shared: Number of first slabs that other sequences may hold too.
    """

    shared = 0

    def grow(self, count: int, lend: Lend) -> None:
        """Grow to at least ``count`` slabs; those lent before an error are kept."""
        while len(self) < count:
            self.append(lend())

    def twin(self, complete: int, used: int, lend: Lend) -> SequenceSlabs:
        """A copy of the first ``used`` slabs: the first ``complete`` ones are shared, the others copied."""
        twin = SequenceSlabs(self[:complete])
        for slab in self[complete:used]:
            twin.append(lend().copy_(slab))
        self.shared = max(self.shared, complete)
        twin.shared = complete
        return twin

    def own(self, first: int, stop: int, lend: Lend) -> None:
        """Replace shared slabs from number ``first`` to ``stop`` by copies, which may be written.

        Slabs from ``stop`` on must not be needed any more. Raises HostMemoryError, having changed nothing.
        """
        copies = [lend().copy_(slab) for slab in self[first : min(self.shared, stop)]]
        self[first : first + len(copies)] = copies

    def cut(self, stop: int, complete: int) -> None:
        """Drop the slabs from number ``stop`` on; no more than ``complete`` of the others are shared."""
        del self[stop:]
        self.shared = min(self.shared, complete)

    def take(self, other: SequenceSlabs) -> None:
        """Take all slabs of another sequence, which then has none, in place of one's own."""
        self[:], self.shared = other, other.shared
        other.clear()
        other.shared = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceSlabs:
        raise TypeError("copied by its HostStore, which knows which slabs are complete")
