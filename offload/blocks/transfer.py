"""Asynchronous copies between a device and pinned memory, on one stream per direction.

A copy starts after the work already queued on the caller's stream. On a CPU the same calls copy synchronously.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Up to this many bytes (a decoding step's), copying on the caller's stream is cheaper than using another one.
SMALL_BYTES = 1 << 20


class PendingCopy:
    """The copies of one `HostCopier.send`. It keeps their source tensors alive until they have been read."""

    def __init__(self, done: Any, held: tuple[Tensor, ...]) -> None:
        self._done, self._held = done, held  # event after the last copy, source tensors

    def wait(self) -> None:
        """Returns when everything is in host memory."""
        self._done.synchronize()
        self._held = ()


class HostCopier:
    """Copies from one device to pinned memory. Several threads may send.

    Source tensors live until they are copied, and the host may be far ahead of the device. So `send` first waits for
    the previous large copy: during a prefill the keys and values of at most two layers are alive, one being copied and
    one being computed. Small copies run on the caller's stream; they are neither held nor waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = torch.get_device_module(device)
        self._stream = copy_stream(device)
        # Weak: tensors of a cache must not outlive it, so its `HostStore` holds the pending copies.
        self._last: Callable[[], PendingCopy | None] = lambda: None
        self._sending = threading.Lock()

    def send(
        self,
        pieces: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]],
        join: Callable[[tuple[Tensor, Tensor]], Tensor],
    ) -> PendingCopy:
        """Copies what ``join`` makes of keys and values, for each (target, (keys, values)), to the contiguous target.

        If it raises, some copies may be in flight: call `drain` before using their targets.
        """
        held = {part.untyped_storage().data_ptr(): part for _, parts in pieces for part in parts}
        nbytes = sum(part.untyped_storage().nbytes() for part in held.values())
        with self._sending:
            stream = current = self._streams.current_stream(self._device)
            if is_large := nbytes > SMALL_BYTES:
                if (last := self._last()) is not None:
                    last.wait()
                stream = self._stream
                stream.wait_stream(current)
            with self._streams.stream(stream):
                for target, parts in pieces:
                    # One piece at a time, so that what is joined takes the memory of one piece.
                    target.copy_(join(parts), non_blocking=True)
            pending_copy = PendingCopy(self._event(stream), tuple(held.values()) if is_large else ())
            if is_large:
                self._last = weakref.ref(pending_copy)
        return pending_copy

    def drain(self) -> None:
        """Returns when all copies and all work queued on the caller's stream are done."""
        for stream in (self._stream, self._streams.current_stream(self._device)):
            self._event(stream).synchronize()

    def _event(self, stream: Any) -> Any:
        event = self._streams.Event()
        event.record(stream)
        return event


@functools.cache
def host_copier(device: torch.device) -> HostCopier:
    """The device's only `HostCopier`."""
    return HostCopier(device)


@functools.cache
def upload_stream(device: torch.device) -> Any:
    """The device's only stream for copies from host memory."""
    return copy_stream(device)


def copy_stream(device: torch.device) -> Any:
    """A new high-priority stream: its few small kernels run before the model's."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else torch.cpu.Stream()
