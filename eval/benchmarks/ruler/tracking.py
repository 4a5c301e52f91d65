"""vt: variable tracking."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attention_predictor.eval.benchmarks.haystack import Draft
from attention_predictor.eval.benchmarks.ruler.base import Family, Sources, distinct, in_noise

_TRACK = (
    "Some variables are assigned values in the text below, directly or by way of each other. Keep track of them.\n\n"
    "{context}\nQuestion: Which variables have the value {value} in the end? Find all of them."
)
_TRACK_PREFIX = " Answer: By the assignments in the text above, {count} variables have the value {value}, they are:"


@dataclass(frozen=True)
class VariableTracking(Family):
    """A chain of assignments scattered over noise; the answer lists its variables. A solved example comes first."""

    hops: int = 4

    new_tokens: ClassVar[int] = 30

    def draft(self, rng: random.Random, sources: Sources, length: int) -> Draft:
        names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), 2 * (self.hops + 1))
        example, chain = (self._chain(rng, names[part::2]) for part in (0, 1))
        shown, shown_prefix = self._ask(example, 20)
        solved = shown + shown_prefix + " " + " ".join(example.names) + "\n\n"
        return Draft(
            tuple(chain.names), lambda sentences: solved + self._ask(chain, sentences)[0], self._ask(chain, 0)[1]
        )

    def _chain(self, rng: random.Random, names: Sequence[str]) -> _Chain:
        value = str(rng.randint(10000, 99999))
        right = [value, *(f"VAR {name}" for name in names)]
        lines = [f"VAR {name} = {of}" for name, of in zip(names, right, strict=False)]
        depths = sorted(rng.random() for _ in lines)
        return _Chain(value, list(names), list(zip(depths, lines, strict=True)))

    def _ask(self, chain: _Chain, sentences: int) -> tuple[str, str]:
        words = {"value": chain.value, "count": len(chain.names)}
        return _TRACK.format(context=in_noise(sentences, chain.lines), **words), _TRACK_PREFIX.format(**words)


@dataclass(frozen=True)
class _Chain:
    value: str
    names: list[str]
    lines: list[tuple[float, str]]
