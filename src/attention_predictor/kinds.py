"""Kinds of setting and option values: how to read them from text, and which are allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words; a test of a value


class NotAllowedError(ValueError):
    """Text that is not an allowed value; the message says what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of value.

    Attributes:
        read: Text as a value; ``ValueError`` for text that is none.
        rules: Each must hold; a value is judged by one only where those before it hold.
        metavar: Stands for a value in help texts.
        alone: The value of an option that is given without one; ``None`` if it needs one.
    """

    read: Callable[[str], Any]
    rules: Callable[[], Sequence[Rule]]
    metavar: str | None = None
    alone: Any = None

    def expected(self, value: object) -> str | None:
        """What is allowed instead of this value; ``None`` if the value is allowed."""
        rules = self.rules()
        broken = next((at for at, (_, holds) in enumerate(rules) if not holds(value)), None)
        return None if broken is None else ", ".join(words for words, _ in rules[broken:])

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        return ", ".join(words for words, _ in self.rules())

    def parse(self, text: str) -> Any:
        """Parse text to an allowed value; else ``NotAllowedError``, which says what is allowed."""
        try:
            value = self.read(text)
        except ValueError as error:
            raise NotAllowedError(self.allowed) from error
        if (expected := self.expected(value)) is not None:
            raise NotAllowedError(expected)
        return value

    def or_none(self) -> Kind:
        """This kind, or ``None``, written as none."""
        return self._or(None, "none", "None")

    def or_name(self, name: str) -> Kind:
        """This kind, or a name."""
        return self._or(name, name, name)

    def _or(self, other: str | None, written: str, words: str) -> Kind:
        def either(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
            return lambda value: (isinstance(value, type(other)) and value == other) or holds(value)

        return Kind(
            read=lambda text: other if text.strip().lower() == written else self.read(text),
            rules=lambda: [(f"{allowed}, or {words}", either(holds)) for allowed, holds in self.rules()],
            metavar=self.metavar,
        )


# Of random numbers: those that torch takes.
SEED = Kind(
    read=int,
    rules=lambda: [("an integer of 64 bits", lambda value: is_whole(value) and -(2**63) <= value < 2**64)],
    metavar="N",
)


def temperature() -> Kind:
    """Temperatures of sampling: what logits are divided by, 0 for greedy choice."""
    return number("0, or 1e-06 or more", lambda value: value == 0 or value >= 1e-6, "T")  # less may give infinity


def whole(least: int | None = None, most: int | None = None, also: Rule | None = None, metavar: str = "N") -> Kind:
    """Integers from ``least`` to ``most``; ``also`` is a rule in place of these bounds."""
    rules: list[Rule] = [("an integer", lambda value: is_whole(value) and value.bit_length() < 64)]
    if also is not None:
        rules.append(also)
    elif least is not None and most is not None:
        rules.append((f"{least} to {most}", lambda value: least <= value <= most))
    elif least is not None:
        rules.append((f"at least {least}", lambda value: value >= least))
    return Kind(read=int, rules=lambda: rules, metavar=metavar)


def number(words: str, holds: Callable[[float], bool], metavar: str = "X") -> Kind:
    """Finite numbers, integers included, for which ``holds`` is true."""
    allowed = (words, lambda value: is_number(value) and abs(value) <= sys.float_info.max and holds(value))
    return Kind(read=float, rules=lambda: [allowed], metavar=metavar)


def one_of(names: Sequence[Any] | Callable[[], Sequence[Any]], read: Callable[[str], Any] = str) -> Kind:
    """One of some names, or of some integers (``read=int``)."""

    def rules() -> list[Rule]:
        known = names() if callable(names) else names
        return [("one of " + ", ".join(map(str, known)), lambda value: _is_in(value, known))]

    return Kind(read=read, rules=rules, metavar="NAME" if read is str else "N")


def text(words: str, metavar: str) -> Kind:
    """Non-empty text."""
    allowed = (words, lambda value: isinstance(value, str) and value != "")
    return Kind(read=str, rules=lambda: [allowed], metavar=metavar)


def flag() -> Kind:
    """True or False, also written yes and no, 1 and 0; an option of this kind alone means True."""
    allowed = ("True or False", lambda value: isinstance(value, bool))
    return Kind(read=_read_flag, rules=lambda: [allowed], metavar="BOOL", alone=True)


def sizes_in_bytes() -> Kind:
    """A positive number of bytes, also written with a unit, such as 64GiB."""
    allowed = ("a positive number of bytes", lambda value: is_whole(value) and value > 0)
    return Kind(read=_read_bytes, rules=lambda: [allowed], metavar="BYTES")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether the value is an integer; bools are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is an integer or a float; bools are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_numbers(text: str, separators: str = ",+") -> list[int]:
    """Parse ``"0,1"`` or, where commas have another meaning, ``"0+1"``; ``ValueError`` for anything else."""
    for separator in separators[1:]:
        text = text.replace(separator, separators[0])
    return [int(part) for part in text.split(separators[0])]


def _is_in(value: object, known: Sequence[Any]) -> bool:
    return any(isinstance(value, type(one)) and not isinstance(value, bool) and value == one for one in known)


_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _read_flag(text: str) -> bool:
    try:
        return _FLAGS[text.strip().lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither True nor False") from None


_UNITS = {"b": 1} | {
    letter + "i" * binary + "b": (1024 if binary else 1000) ** (place + 1)
    for place, letter in enumerate("kmgt")
    for binary in (True, False)
}


def _read_bytes(text: str) -> int:
    written = text.strip().lower()
    unit = next((name for name in sorted(_UNITS, key=len, reverse=True) if written.endswith(name)), None)
    if unit is None:
        return int(written)
    size = float(written.removesuffix(unit)) * _UNITS[unit]
    if not math.isfinite(size):
        raise ValueError(f"{text!r} is not a number of bytes")
    return round(size)
