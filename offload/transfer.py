"""Copies between a device and pinned memory that run beside the computation, on one stream for each direction.

A copy begins when the caller's stream has done what it was given before. On a CPU the same calls do everything at once.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Tensors of up to this many bytes, those of decoding steps, are not worth waiting for.
SMALL_BYTES = 1 << 20


class Shipment:
    """What one `Outbox.send` copies. It keeps the tensors that are read, until they have been."""

    def __init__(self, read: Any, held: tuple[Tensor, ...]) -> None:
        self._read, self._held = read, held  # an event behind the last copy

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._read.query()

    def wait(self) -> None:
        """Returns when everything is in host memory."""
        self._read.synchronize()
        self._held = ()


class Outbox:
    """Copies from one device to pinned memory, in the order of the calls. Several threads may send.

    The host may be far ahead of the device, and whatever is sent lives until it has been read. So `send` first waits
    for what was sent before, unless that is small: of a prefill, the keys and values of two layers are alive at most,
    those that leave and those that are being computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = torch.get_device_module(device)
        self._stream = side_stream(device)
        # Weak: what belongs to a cache must not outlive it, so its `HostStore` holds the shipments.
        self._sent: deque[tuple[weakref.ref[Shipment], int]] = deque()
        self._sending = threading.Lock()

    def send(self, pieces: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]]) -> Shipment:
        """Copies, for each (target, (keys, values)), the two, stacked in dimension −3, to the contiguous target.

        If it raises, pieces may be under way: `drain` before their targets are used for anything else.
        """
        storages = {part.untyped_storage().data_ptr(): part for _, parts in pieces for part in parts}
        nbytes = sum(part.untyped_storage().nbytes() for part in storages.values())
        with self._sending:
            self._make_room()
            self._stream.wait_stream(self._streams.current_stream(self._device))
            with self._streams.stream(self._stream):
                for target, parts in pieces:
                    # A piece at a time: the stream's own memory, where they are stacked, is that of one piece.
                    target.copy_(torch.stack(parts, dim=-3), non_blocking=True)
            shipment = Shipment(self._event(), tuple(storages.values()))
            self._sent.append((weakref.ref(shipment), nbytes))
        return shipment

    def drain(self) -> None:
        """Returns when no copy is under way."""
        self._event().synchronize()

    def _event(self) -> Any:
        event = self._streams.Event()
        event.record(self._stream)
        return event

    def _make_room(self) -> None:
        while self._sent:
            shipment = self._sent[0][0]()
            if shipment is not None:
                if not shipment.arrived and sum(nbytes for _, nbytes in self._sent) <= SMALL_BYTES:
                    return
                shipment.wait()
            self._sent.popleft()


@functools.cache
def outbox(device: torch.device) -> Outbox:
    """The one outbox of a device."""
    return Outbox(device)


@functools.cache
def inward(device: torch.device) -> Any:
    """The one stream of a device for copies from host memory."""
    return side_stream(device)


def side_stream(device: torch.device) -> Any:
    """A stream whose few small kernels go before those of the model."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else torch.cpu.Stream()
