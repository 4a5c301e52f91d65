"""Turns: offloaded and stock forwards of one model, which are never in progress at the same time.

Models read the name of their attention function from a configuration, which all threads share. So forwards of one kind
run beside each other, those of the other kind wait for them, and the first to ask is the first to go.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Gives turns to threads.

    Args:
        switch: Called with True when the first stock forward begins, with False when the last has ended.
    """

    def __init__(self, switch: Callable[[bool], None]) -> None:
        self._switch = switch
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # in the order in which they asked
        self._stock = False  # the kind of those in progress
        self._running = 0
        self._own = threading.local()  # whether this thread has a turn

    @contextmanager
    def take(self, *, stock: bool) -> Iterator[None]:
        """Wait until no forward of the other kind is in progress; a thread that has a turn waits for nothing."""
        if getattr(self._own, "has", False):
            yield
            return
        self._begin(stock)
        self._own.has = True
        try:
            yield
        finally:
            self._own.has = False
            self._end()

    def _begin(self, stock: bool) -> None:
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is me and (self._running == 0 or self._stock == stock))
                if stock and self._running == 0:
                    self._switch(True)
                self._stock = stock
                self._running += 1
            finally:
                self._waiting.remove(me)  # also after an interrupt
                self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._running -= 1
            if self._stock and self._running == 0:
                self._switch(False)
            self._changed.notify_all()
