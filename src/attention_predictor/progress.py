"""Progress of long work: a bar on a terminal, elsewhere an occasional line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A context manager around the work, which calls ``update``.

    On a terminal a bar. Elsewhere, in a log file for example, a line of what is done, the rate and the time left, at
    most every half minute, and one at the end. A stream that can't be written to never ends the work.

    Args:
        title: What is being done.
        total: How many units there are.
        unit: What they are called, in the plural.
        done: Of these, how many were done before.
        ends: Whether to say a line at the end; not of what others only wait for, where it takes no time.
        quiet: Say nothing, as processes do that are not the main one.
        stream: Standard error, if ``None``.
        clock: Seconds.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        ends: bool = True,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.figures: dict[str, str] = {}
        self._first, self._ends, self._quiet, self._clock = done, ends, quiet, clock
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._ended = False
        self._started = self._said = clock()
        with suppress(OSError, ValueError):  # a closed stream
            if not quiet and self._stream is not None and self._stream.isatty():
                from tqdm import tqdm

                self._bar = tqdm(desc=title, total=total, unit=" " + unit, initial=done, file=self._stream)

    def update(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self.reach(self.done + count)

    def reach(self, done: int) -> None:
        """Set the number of units done."""
        more, self.done = done - self.done, done
        if self._bar is not None:
            self._on_bar(lambda: self._bar.update(more))
        elif self._clock() - self._said >= SECONDS_BETWEEN_LINES:
            self._say()

    def describe(self, title: str, *, anew: bool = False) -> None:
        """Set the description of the current work; ``anew``: rate and time left are counted from here on."""
        self.title = title
        if anew:
            self._first, self._started = self.done, self._clock()
            if self._bar is not None:
                self._bar.unpause()
        if self._bar is not None:
            self._on_bar(lambda: self._bar.set_description(title))

    def show(self, **figures: str) -> None:
        """Show figures beside the count, until the next call."""
        self.figures = figures
        if self._bar is not None:
            self._on_bar(lambda: self._bar.set_postfix(**figures))

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._on_bar(lambda: self._bar.write(line, file=self._stream))
        else:
            self._print(line)

    def close(self, *, finished: bool = True) -> None:
        """End the display; with ``finished=False`` the caller reports why the work ended."""
        if self._ended:
            return
        self._ended = True
        if self._bar is not None:
            self._on_bar(self._bar.close)
        elif finished and self._ends and self.done > self._first:
            self._say()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(finished=error is None)

    def _say(self) -> None:
        self._said = self._clock()
        seconds, new = self._said - self._started, self.done - self._first
        parts = [f"{self.title}: {self.done} of {self.total} {self.unit}"]
        if new > 0 and seconds > 0:
            parts.append(_rate(new / seconds, self.unit))
            left = (self.total - self.done) * seconds / new
            parts.append(f"in {_duration(seconds)}" if self.done >= self.total else f"{_duration(left)} left")
        parts += [f"{name} {value}" for name, value in self.figures.items()]
        self._print(", ".join(parts))

    def _print(self, line: str) -> None:
        if not self._quiet and self._stream is not None:
            with suppress(OSError, ValueError):
                print(line, file=self._stream, flush=True)

    def _on_bar(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):
            self._bar.disable = True


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second:.1f} {unit} a second" if per_second >= 1 else f"{1 / per_second:.1f} s each"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
