"""Turns: offloaded and stock forwards of one model, which are never in progress at the same time.

Models read the name of their attention function from a configuration, which all threads share. So forwards of one kind
run beside each other, those of the other kind wait for them, and the first to ask is the first to go. A forward must
not wait for another thread's forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Turns:
    """Gives turns to threads.

    An interrupt may come at any point. What it leaves behind is mended when the same thread asks again.

    Args:
        switch: Called, under ``lock``, with True when stock forwards begin, and with False when offloaded ones do or
            the last stock one has ended; perhaps twice.

    Attributes:
        lock: Held while turns are given and taken back, not during a forward.
    """

    def __init__(self, switch: Callable[[bool], None]) -> None:
        self.lock = threading.Condition()
        self._switch = switch
        self._stock = False  # the kind of those in progress
        self._waiting: dict[Turn, threading.Thread] = {}  # in the order in which they asked
        self._running: dict[Turn, threading.Thread] = {}

    def take(self, *, stock: bool, joins: bool = False) -> Turn:
        """A context manager that waits until no forward of the other kind is in progress.

        Args:
            joins: For what is part of a forward, or needed by one: it begins at once if this thread has a turn, or if
                forwards of its kind are in progress.
        """
        return Turn(self, stock, joins)

    def begin(self, turn: Turn) -> None:
        """Wait for a turn."""
        with self.lock:
            if not (turn.joins and self._is_part(turn)):
                self._forget_interrupted()
                self._waiting[turn] = threading.current_thread()
                self.lock.wait_for(lambda: self._may_begin(turn))
                if not self._running:
                    self._switch(turn.stock)
                    self._stock = turn.stock
            self._running[turn] = threading.current_thread()
            self._waiting.pop(turn, None)
            self.lock.notify_all()

    def end(self, turn: Turn) -> None:
        """Take a turn back, also one that is still waited for."""
        with self.lock:
            self._waiting.pop(turn, None)
            self._running.pop(turn, None)
            if self._stock and not self._running:
                self._switch(False)
                self._stock = False
            self.lock.notify_all()

    def _is_part(self, turn: Turn) -> bool:
        mine = threading.current_thread() in self._running.values()
        return mine or (bool(self._running) and self._stock is turn.stock)

    def _may_begin(self, turn: Turn) -> bool:
        return next(iter(self._waiting)) is turn and (not self._running or self._stock is turn.stock)

    def _forget_interrupted(self) -> None:
        """Forget turns of threads that are gone, and of this one, which would not ask for another if it had one."""
        this = threading.current_thread()
        for turns in (self._waiting, self._running):
            for one, thread in list(turns.items()):
                if thread is this or not thread.is_alive():
                    del turns[one]


class Turn:
    """One turn; see ``Turns.take``."""

    def __init__(self, turns: Turns, stock: bool, joins: bool) -> None:
        self.turns, self.stock, self.joins = turns, stock, joins

    def __enter__(self) -> None:
        try:
            self.turns.begin(self)
        except BaseException:
            self.turns.end(self)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.turns.end(self)
