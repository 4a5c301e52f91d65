"""HostMemory: the host memory of one engine's caches. Exact in size, pinned in parallel, freed when a slab dies.

torch's own allocator of pinned memory rounds every block up to a power of two, pins with one thread, and reuses memory
only after garbage collection.
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
from attention_predictor.csrc import binding
from attention_predictor.errors import HostMemoryError, IntegrityError
from attention_predictor.offload.blocks.available_memory import available_memory
from attention_predictor.offload.blocks.numa import cpus_near, run_on
from attention_predictor.sizes import size_text

logger = logging.getLogger(__name__)
# The driver pins one piece at a time and blocks other calls meanwhile. With this lock, the thread that launches the
# model's kernels competes with one worker for the driver, not with all of them.
_pinning = threading.Lock()

ALIGNMENT = 256  # bytes; slabs begin at multiples
SEGMENT_BYTES = 64 << 20  # largest segment, unless one slab needs more; the first is ready in some 30 ms
SMALL_BYTES = 1 << 20  # smaller segments are allocated synchronously
WORKERS = 16  # most threads that allocate segments
SPARE_BYTES = 256 << 20  # left to the rest of the system


class Segment:
    """A piece of anonymous memory, pinned on request, whose spans are lent. A worker allocates it: see ``ready``.

    Attributes:
        pinned: Whether it is pinned; valid once it is ready.
        free: Start and size of each free span, in order, never adjacent.
        ready: Done when a worker has allocated and pinned the memory.
    """

    def __init__(self, nbytes: int, pin_for: Sequence[torch.device], workers: Callable[[], Executor]) -> None:
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
        """Free a span, and merge it with adjacent free ones."""
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
        """Unpin the memory. The system gets it back when its last tensor has died."""
        self.ready.exception()  # waits
        if self._unpin is not None:
            self._unpin()

    def _make(self, pin_for: Sequence[torch.device]) -> None:
        # Touch each page first: the system provides pages to several threads in parallel, but pins with one.
        self.bytes.numpy()[:: mmap.PAGESIZE] = 0
        if not pin_for:
            return
        address = self.bytes.data_ptr()
        with _pinning:
            code = _register(address, self.nbytes)
        if code:
            self.refusal = str(torch.cuda.CudaError(code))
            return
        self.pinned = True
        # Runs even if nobody calls close(): memory returned to the system while pinned could not be pinned again.
        self._unpin = weakref.finalize(self, _unpin, address, pin_for)
        self._unpin.atexit = False


def _register(address: int, nbytes: int) -> int:
    """Pin memory for every device. Returns CUDA's error code, 0 on success."""
    portable = 1
    return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, portable))


def _unpin(address: int, gpus: Sequence[torch.device]) -> None:
    _wait_for(gpus)  # they may be reading
    torch.cuda.cudart().cudaHostUnregister(address)


class HostMemory:
    """Lends slabs. A slab's memory is free again as soon as its tensor has died, without garbage collection.

    Slabs may be borrowed and die on any thread. Segments stay until ``close``, or until their memory is needed.
    """

    def __init__(
        self,
        pin_for: Sequence[torch.device] = (),
        note: Callable[[str], None] = logger.warning,
        limit: int | None = None,
    ) -> None:
        """``pin_for``: the GPUs that use the memory; ``note`` is called with a message if pinning fails.

        ``limit``: most bytes that are lent at a time; ``None``: what the system has available.
        """
        self.pin_for, self.note, self.limit = tuple(pin_for), note, limit
        self._lent_bytes = 0
        self._refused = False
        self._segments: list[Segment] = []
        self._unready: list[tuple[Future[None], int]] = []  # of each that a worker may still allocate: `ready`, bytes
        self._full: dict[int, int] = {}  # by size: number of leading segments without a large enough span
        # Filled by finalizers. They run at any time on any thread, so they take no lock until memory is closed.
        self._returned: deque[tuple[Segment, int, int]] = deque()
        self._lock = threading.RLock()
        self._workers: ThreadPoolExecutor | None = None
        self._closed = self._collecting = False

    @property
    def held_bytes(self) -> int:
        """Bytes of all segments, lent or not."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def lent_bytes(self) -> int:
        """Bytes of the slabs that are alive, each in whole spans."""
        with self._lock:
            self._collect()
            return self._lent_bytes

    @property
    def unready_bytes(self) -> int:
        """Bytes of segments being allocated, which the system may still report as available."""
        with self._lock:
            self._unready = [one for one in self._unready if not one[0].done()]
            return sum(nbytes for _, nbytes in self._unready)

    @property
    def free_bytes(self) -> int:
        """Bytes that can be lent without allocating more."""
        with self._lock:
            self._collect()
            return sum(size for segment in self._segments for _, size in segment.free)

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """A slab, uninitialised, and whether it is pinned.

        Raises:
            HostMemoryError: It would pass the limit, or too little memory is available.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype), True
        room = aligned(nbytes)
        with self._lock:
            self._collect()
            if self.limit is not None and self._lent_bytes + room > self.limit:
                raise HostMemoryError(
                    f"{size_text(room)} more of host memory for KV blocks: host_memory allows {size_text(self.limit)}, "
                    f"and this engine's caches hold {size_text(self._lent_bytes)}"
                )
            if (found := self._find(room)) is None:
                self._add(room)
                found = self._find(room)
                assert found is not None
            segment, start = found
            segment.take(start, room)
            self._lent_bytes += room
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
        """Start allocating memory for slabs, given as pairs (bytes of each, number), in the background.

        Raises:
            HostMemoryError: Too little memory is available.
        """
        with self._lock:
            self._collect()
            spans = [(size, segment) for segment in self._segments for _, size in segment.free]
            counted: list[Segment] = []
            for nbytes, count in slabs:
                room = aligned(nbytes)
                for at, (size, segment) in enumerate(spans):
                    if taken := min(size // room, count):
                        spans[at] = size - taken * room, segment
                        counted.append(segment)
                        count -= taken
                # One segment per worker, within the limits of a segment's size.
                size = min(max(ceil_div(count * room, WORKERS), SMALL_BYTES), SEGMENT_BYTES)
                each = max(size // room, 1)
                while count > 0:
                    counted.append(self._add(min(each, count) * room, keep=counted))
                    count -= each

    def wait_for_gpus(self) -> None:
        """Return when the GPUs have done all work queued so far."""
        _wait_for(self.pin_for)

    def close(self) -> None:
        """Return memory to the system: free segments now, others when their slabs die. Idempotent."""
        with self._lock:
            self._collect()
            for segment in [one for one in self._segments if one.is_free]:
                self._drop(segment)
            # Only now, since finalizers return memory themselves from here on, and may run within the lines above.
            self._closed = True
            self._collect()
            if self._workers is not None:
                self._workers.shutdown(wait=False)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless free spans are within their segments, in order, and not adjacent."""
        with self._lock:
            self._collect()
            for segment in self._segments:
                ends = [-1, *(start + size for start, size in segment.free)]
                apart = all(size > 0 and start > end for (start, size), end in zip(segment.free, ends, strict=False))
                if not apart or ends[-1] > segment.nbytes:
                    raise IntegrityError(f"a segment of {segment.nbytes} bytes has free spans {segment.free}")

    def _find(self, room: int) -> tuple[Segment, int] | None:
        """The first segment with a large enough span, and the start of its smallest such span."""
        for number in range(self._full.get(room, 0), len(self._segments)):
            segment = self._segments[number]
            fitting = [(size, start) for start, size in segment.free if size >= room]
            if fitting:
                self._full[room] = number
                return segment, min(fitting)[1]
        return None

    def _add(self, nbytes: int, keep: Sequence[Segment] = ()) -> Segment:
        """Allocate a segment; if memory is short, drop free segments that are not in ``keep``."""
        limit = available_memory() - SPARE_BYTES - self.unready_bytes
        if nbytes > limit:
            for segment in [one for one in self._segments if one.is_free and one not in keep]:
                limit += segment.nbytes
                self._drop(segment)
                if nbytes <= limit:
                    break
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
        self._unready.append((segment.ready, segment.nbytes))
        return segment

    def _executor(self) -> Executor:
        if self._workers is None:
            # Workers touch each page first, which decides the NUMA node that it lies on.
            near = cpus_near(binding.pci_bus_id(gpu) for gpu in self.pin_for)
            if self.pin_for and not near:
                logger.info("host memory lies on any NUMA node: that of %s is unknown or not one", self.pin_for)
            self._workers = ThreadPoolExecutor(
                min(WORKERS, len(near) or os.cpu_count() or 1),
                thread_name_prefix="attention-predictor-memory",
                initializer=run_on,
                initargs=(near,),
            )
        return self._workers

    def _drop(self, segment: Segment) -> None:
        segment.close()
        self._segments.remove(segment)
        self._full.clear()

    def _give_back(self, segment: Segment, start: int, nbytes: int) -> None:
        self._returned.append((segment, start, nbytes))
        if self._closed:
            with self._lock:
                self._collect()

    def _collect(self) -> None:
        """Free the spans of slabs that have died, after waiting for the GPUs, which may still use them."""
        if self._collecting:
            return  # a slab has died within the loop below, on this thread: the loop will find it
        self._collecting = True
        try:
            while count := len(self._returned):
                self.wait_for_gpus()
                for _ in range(count):
                    segment, start, nbytes = self._returned.popleft()
                    segment.put_back(start, nbytes)
                    self._lent_bytes -= nbytes
                    if self._closed and segment.is_free:
                        self._drop(segment)
                self._full.clear()
        finally:
            self._collecting = False


def _wait_for(gpus: Sequence[torch.device]) -> None:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)


def aligned(nbytes: int) -> int:
    """Bytes of the span that is lent for so many."""
    return ceil_div(nbytes, ALIGNMENT) * ALIGNMENT
