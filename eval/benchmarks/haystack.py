"""Filler text: ``Draft``, a sample before its length is set, and ``Haystack``, text to hide statements in."""

from __future__ import annotations

import bisect
import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attention_predictor.errors import DataError

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s*$")


@dataclass(frozen=True)
class Draft:
    """A sample before its length is set.

    Attributes:
        answers: References.
        fill: The text with a number of filler pieces, question included.
        prefix: How the answer begins; part of the prompt, in a chat as the beginning of the assistant's turn.
        most: Pieces there are; ``None`` for as many as wanted.
        record: Fields of the sample's line besides answers and length.
    """

    answers: tuple[str, ...]
    fill: Callable[[int], str]
    prefix: str
    most: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


class Haystack:
    """The words of some texts, repeated endlessly, with statements inserted between sentences."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        joined = "\n\n".join(text.strip() for text in texts.values()) + "\n\n"
        self.sha256 = hashlib.sha256(joined.encode()).hexdigest()
        self.words = re.findall(r"\S+\s*", joined)
        self.ends = [place + 1 for place, word in enumerate(self.words) if _SENTENCE_END.search(word)]
        if not self.ends:
            raise DataError("the haystack contains no sentence: expected plain text")

    def start(self, rng: random.Random) -> int:
        """A random position after a sentence."""
        return rng.choice(self.ends) % len(self.words)

    def bury(self, start: int, words: int, statements: Sequence[tuple[float, str]]) -> str:
        """``words`` words from ``start`` on, each statement inserted after the sentence that ends nearest its depth.

        Args:
            statements: Depth, from 0 (before the first word) to 1 (after the last), and text.
        """
        pieces, done = [], 0
        for depth, statement in sorted(statements, key=lambda one: one[0]):
            place = max(self._nearest_end(start, words, depth), done)
            pieces += [self._text(start + done, start + place), statement + " "]
            done = place
        return "".join([*pieces, self._text(start + done, start + words)]).rstrip()

    def _nearest_end(self, start: int, words: int, depth: float) -> int:
        """Words from ``start`` on to the end of a sentence; none, where there is no sentence within."""
        wanted, total = depth * words, len(self.words)
        turns, target = divmod(start + round(wanted), total)
        place = bisect.bisect(self.ends, target)
        near = [turns * total + self.ends[i] for i in (place - 1, place) if 0 <= i < len(self.ends)]
        near += [(turns - 1) * total + self.ends[-1], (turns + 1) * total + self.ends[0]]
        inside = [end - start for end in near if 0 < end - start <= words]
        return min([0, *inside], key=lambda end: abs(end - wanted))

    def _text(self, start: int, stop: int) -> str:
        total = len(self.words)
        parts = []
        while start < stop:
            first = start % total
            taken = min(stop - start, total - first)
            parts.append("".join(self.words[first : first + taken]))
            start += taken
        return "".join(parts)
