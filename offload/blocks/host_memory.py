"""HostMemory: the host memory of one engine's caches. Exact in size, pinned in parallel, free the moment a slab dies.

torch's own allocator of pinned memory rounds every block up to a power of two, pins with one thread, and pins anew what
garbage has not given back yet.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import HostMemoryError, IntegrityError
from attention_predictor.offload.blocks.available_memory import available_memory
from attention_predictor.sizes import size_text

logger = logging.getLogger(__name__)
# The driver pins one piece at a time, and nobody else gets through meanwhile: the thread that launches the model's
# kernels should have one rival for the driver, not WORKERS of them.
_pinning = threading.Lock()

ALIGNMENT = 256  # bytes: a slab begins at a multiple
SEGMENT_BYTES = 64 << 20  # of a segment at most, unless one slab needs more: the first is ready in some 30 ms
SMALL_BYTES = 1 << 20  # a segment of fewer is made at once, by whoever asks
WORKERS = 16  # threads that make them, at most
SPARE_BYTES = 256 << 20  # left to the rest of the system


class Segment:
    """A piece of anonymous memory, pinned if asked for, of which spans are lent. Made by a worker: ``ready`` says when.

    Attributes:
        pinned: Whether it is; known once it is ready.
        free: Start and size of each free span, in order; no two of them touch.
    """

    def __init__(self, nbytes: int, pin_for: torch.device | None, workers: Callable[[], Executor]) -> None:
        self.nbytes = math.ceil(nbytes / mmap.PAGESIZE) * mmap.PAGESIZE
        self.bytes = torch.frombuffer(mmap.mmap(-1, self.nbytes), dtype=torch.uint8)
        self.pinned = False
        self.free = [(0, self.nbytes)]
        self.refusal: str | None = None  # why the system did not pin it
        self._unpin: weakref.finalize | None = None
        if self.nbytes >= SMALL_BYTES:
            self.ready: Future[None] = workers().submit(self._make, pin_for)
        else:
            self.ready = Future()
            self._make(pin_for)
            self.ready.set_result(None)

    def take(self, start: int, nbytes: int) -> None:
        """Take the first bytes of the free span that begins at ``start``."""
        at = next(i for i, (begin, _) in enumerate(self.free) if begin == start)
        size = self.free[at][1]
        self.free[at : at + 1] = [(start + nbytes, size - nbytes)] if size > nbytes else []

    def put_back(self, start: int, nbytes: int) -> None:
        """Free a span, and join it with free ones beside it."""
        joined: list[tuple[int, int]] = []
        for begin, size in sorted([*self.free, (start, nbytes)]):
            if joined and sum(joined[-1]) == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((begin, size))
        self.free = joined

    @property
    def is_free(self) -> bool:
        return self.free == [(0, self.nbytes)]

    def close(self) -> None:
        """Unpin the memory, which is the system's again as soon as the last tensor of it has died."""
        self.ready.exception()  # waits
        if self._unpin is not None:
            self._unpin()

    def _make(self, pin_for: torch.device | None) -> None:
        # Touched first, a byte a page: the system gives fresh pages to several threads at once, but pins with one.
        self.bytes.numpy()[:: mmap.PAGESIZE] = 0
        if pin_for is None:
            return
        address = self.bytes.data_ptr()
        with _pinning:
            code = _register(address, self.nbytes)
        if code:
            self.refusal = str(torch.cuda.CudaError(code))
            return
        self.pinned = True
        # Also for a segment that nobody closes: memory that went back to the system pinned could not be pinned again.
        self._unpin = weakref.finalize(self, _unpin, address, pin_for)
        self._unpin.atexit = False


def _register(address: int, nbytes: int) -> int:
    """Pin memory for every device; CUDA's code, 0 if it did."""
    portable = 1
    return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, portable))


def _unpin(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # it may be reading
    torch.cuda.cudart().cudaHostUnregister(address)


class HostMemory:
    """Lends slabs. What a slab takes is lent again when its tensor has died; no garbage collection is needed.

    Any thread may borrow, and a slab may die on any. Segments stay until ``close``, or until another needs their room.
    """

    def __init__(self, pin_for: torch.device | None = None, note: Callable[[str], None] = logger.warning) -> None:
        """``pin_for``: a GPU that reads the memory, which is page-locked for it; ``note`` hears if that is refused."""
        self.pin_for, self.note = pin_for, note
        self._refused = False
        self._segments: list[Segment] = []
        self._full: dict[int, int] = {}  # by size: segments at the beginning that have no room for it
        self._returned: deque[tuple[Segment, int, int]] = deque()  # by finalizers, which must not wait for a lock
        self._lock = threading.RLock()
        self._workers: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Bytes of all segments, lent or not."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def lent_bytes(self) -> int:
        """Bytes of the slabs that are alive."""
        return self.held_bytes - self.free_bytes

    @property
    def unready_bytes(self) -> int:
        """Bytes of segments that are being made; the system still counts much of them as available."""
        return sum(segment.nbytes for segment in self._segments if not segment.ready.done())

    @property
    def free_bytes(self) -> int:
        """Bytes that can be lent without taking more from the system."""
        with self._lock:
            self._collect()
            return sum(size for segment in self._segments for _, size in segment.free)

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A slab, uninitialised, and whether it is pinned.

        Raises:
            HostMemoryError: The system has too little left.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype), True
        room = _aligned(nbytes)
        with self._lock:
            self._collect()
            if (found := self._find(room)) is None:
                self._add(room)
                found = self._find(room)
                assert found is not None
            segment, start = found
            segment.take(start, room)
        try:
            segment.ready.result()
            with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
                slab = segment.bytes[start : start + nbytes].view(dtype).view(shape)
        except BaseException:
            self._returned.append((segment, start, room))
            raise
        weakref.finalize(slab, self._give_back, segment, start, room).atexit = False
        if segment.refusal is not None and not self._refused:
            self._refused = True
            self.note(f"host memory can't be pinned ({segment.refusal}): pageable memory, and no captured steps")
        return slab, segment.pinned

    def prepare(self, slabs: Iterable[tuple[int, int]]) -> None:
        """Begin to make room for so many slabs of so many bytes each (pairs), beside what the caller does next.

        Raises:
            HostMemoryError: The system has too little left.
        """
        with self._lock:
            self._collect()
            spans = [(size, segment) for segment in self._segments for _, size in segment.free]
            counted: list[Segment] = []
            for nbytes, count in slabs:
                room = _aligned(nbytes)
                for at, (size, segment) in enumerate(spans):
                    if taken := min(size // room, count):
                        spans[at] = size - taken * room, segment
                        counted.append(segment)
                        count -= taken
                # As many segments as there are workers, within what is worth one.
                size = min(max(ceil_div(count * room, WORKERS), SMALL_BYTES), SEGMENT_BYTES)
                each = max(size // room, 1)
                while count > 0:
                    counted.append(self._add(min(each, count) * room, keep=counted))
                    count -= each

    def close(self) -> None:
        """Give everything back to the system: now what is free, the rest when its slabs die. Idempotent."""
        with self._lock:
            self._closed = True
            self._collect()
            if self._workers is not None:
                self._workers.shutdown(wait=False)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless free spans lie within their segments, in order, and apart."""
        with self._lock:
            self._collect()
            for segment in self._segments:
                ends = [-1, *(start + size for start, size in segment.free)]
                apart = all(size > 0 and start > end for (start, size), end in zip(segment.free, ends, strict=False))
                if not apart or ends[-1] > segment.nbytes:
                    raise IntegrityError(f"a segment of {segment.nbytes} bytes has free spans {segment.free}")

    def _find(self, room: int) -> tuple[Segment, int] | None:
        """The first segment with room, and the smallest span in it that does."""
        for number in range(self._full.get(room, 0), len(self._segments)):
            segment = self._segments[number]
            fitting = [(size, start) for start, size in segment.free if size >= room]
            if fitting:
                self._full[room] = number
                return segment, min(fitting)[1]
        return None

    def _add(self, nbytes: int, keep: Sequence[Segment] = ()) -> Segment:
        """One more segment; free ones but for ``keep`` give way where the system has too little left."""
        limit = available_memory() - SPARE_BYTES - self.unready_bytes
        for segment in [one for one in self._segments if one.is_free and one not in keep]:
            if nbytes <= limit:
                break
            limit += segment.nbytes
            self._drop(segment)
        if nbytes > limit:
            raise HostMemoryError(
                f"{size_text(nbytes)} more of host memory for KV blocks: the system has {size_text(max(limit, 0))} "
                f"available, and this engine holds {size_text(self.held_bytes)}"
            )
        try:
            segment = Segment(nbytes, self.pin_for, self._executor)
        except OSError as error:  # mmap
            raise HostMemoryError(f"cannot allocate {size_text(nbytes)} of host memory: {error}") from error
        self._segments.append(segment)
        return segment

    def _executor(self) -> Executor:
        if self._workers is None:
            count = min(WORKERS, os.cpu_count() or 1)
            self._workers = ThreadPoolExecutor(count, thread_name_prefix="attention-predictor-memory")
        return self._workers

    def _drop(self, segment: Segment) -> None:
        segment.close()
        self._segments.remove(segment)
        self._full.clear()

    def _give_back(self, segment: Segment, start: int, nbytes: int) -> None:
        self._returned.append((segment, start, nbytes))
        if self._closed:
            self.close()

    def _collect(self) -> None:
        """Free what has been given back since. The device may still copy to it or read it."""
        if self._returned and self.pin_for is not None:
            torch.cuda.synchronize(self.pin_for)
        while self._returned:
            segment, start, nbytes = self._returned.popleft()
            segment.put_back(start, nbytes)
            self._full.clear()
        if self._closed:
            for segment in [one for one in self._segments if one.is_free]:
                self._drop(segment)


def _aligned(nbytes: int) -> int:
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT
