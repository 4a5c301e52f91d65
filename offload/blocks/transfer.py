"""Copies between a device and pinned memory that run beside the computation, on one stream for each direction.

A copy begins when the caller's stream has done what it was given before. On a CPU the same calls do everything at once.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Up to this many bytes, those of decoding steps, a stream of its own is more trouble than a copy.
SMALL_BYTES = 1 << 20


class PendingCopy:
    """What one `HostCopier.send` copies. It keeps the tensors that are read, until they have been."""

    def __init__(self, read: Any, held: tuple[Tensor, ...]) -> None:
        self._read, self._held = read, held  # an event behind the last copy

    def wait(self) -> None:
        """Returns when everything is in host memory."""
        self._read.synchronize()
        self._held = ()


class HostCopier:
    """Copies from one device to pinned memory. Several threads may send.

    The host may be far ahead of the device, and what is sent lives until it has been read. So `send` first waits for
    what was sent before: of a prefill, the keys and values of two layers are alive at most, those that leave and those
    that are being computed. Little is copied by the caller's stream, and neither kept nor waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = torch.get_device_module(device)
        self._stream = copy_stream(device)
        # Weak: what belongs to a cache must not outlive it, so its `HostStore` holds the pending copies.
        self._last: Callable[[], PendingCopy | None] = lambda: None
        self._sending = threading.Lock()

    def send(self, pieces: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]]) -> PendingCopy:
        """Copies, for each (target, (keys, values)), the two, stacked in dimension −3, to the contiguous target.

        If it raises, pieces may be under way: `drain` before their targets are used for anything else.
        """
        held = {part.untyped_storage().data_ptr(): part for _, parts in pieces for part in parts}
        nbytes = sum(part.untyped_storage().nbytes() for part in held.values())
        with self._sending:
            stream = current = self._streams.current_stream(self._device)
            if beside := nbytes > SMALL_BYTES:
                if (last := self._last()) is not None:
                    last.wait()
                stream = self._stream
                stream.wait_stream(current)
            with self._streams.stream(stream):
                for target, parts in pieces:
                    # A piece at a time: the stream's own memory, where they are stacked, is that of one piece.
                    target.copy_(torch.stack(parts, dim=-3), non_blocking=True)
            pending_copy = PendingCopy(self._event(stream), tuple(held.values()) if beside else ())
            if beside:
                self._last = weakref.ref(pending_copy)
        return pending_copy

    def drain(self) -> None:
        """Returns when no copy is under way, and the caller's stream has done all it was given."""
        for stream in (self._stream, self._streams.current_stream(self._device)):
            self._event(stream).synchronize()

    def _event(self, stream: Any) -> Any:
        event = self._streams.Event()
        event.record(stream)
        return event


@functools.cache
def host_copier(device: torch.device) -> HostCopier:
    """The one host_copier of a device."""
    return HostCopier(device)


@functools.cache
def upload_stream(device: torch.device) -> Any:
    """The one stream of a device for copies from host memory."""
    return copy_stream(device)


def copy_stream(device: torch.device) -> Any:
    """A stream whose few small kernels go before those of the model."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else torch.cpu.Stream()
