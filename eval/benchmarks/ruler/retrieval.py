"""niah: needles in a haystack, in all eight forms."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal

from attention_predictor.eval.benchmarks.haystack import Draft
from attention_predictor.eval.benchmarks.ruler.base import Family, Sources, in_noise, spread
from attention_predictor.eval.benchmarks.ruler.words import COMPOUNDS, compounds
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic

_HIDDEN = (
    "{some} special magic {values} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {values} afterwards.\n{context}\nWhat {are_all} the special magic {values} for {query} mentioned in the "
    "provided text?"
)
_PREFIX = " The special magic {values} for {query} mentioned in the provided text {are}"
_NEEDLE = "One of the special magic {values} for {key} is: {value}."
_SECRETS = {"numbers": "secret number", "uuids": "access code"}  # kinds of values that the pocket model knows


@dataclass(frozen=True)
class Retrieval(Family):
    """Values of keys, each stated once; the answer lists the values of some keys.

    Attributes:
        haystack: Noise repeated, essays, or more needles with other keys.
        keys: Number of keys with values, at least ``queries``, the number asked for.
        values: Number of values of each key.
    """

    haystack: Literal["noise", "essays", "needles"]
    key_kind: Literal["words", "uuids"] = "words"
    value_kind: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    new_tokens: ClassVar[int] = 128

    @property
    def option(self) -> str | None:
        return "--haystack" if self.haystack == "essays" else None

    def draft(self, rng: random.Random, sources: Sources, length: int) -> Draft:
        pocket = sources.wording == "pocket"
        keys = _uuids(rng) if self.key_kind == "uuids" else compounds(rng, " " if pocket else "-")
        values = _uuids(rng) if self.value_kind == "uuids" else _numbers(rng)
        held = {key: list(islice(values, self.values)) for key in islice(keys, max(self.keys, self.queries))}
        asked = rng.sample(sorted(held), self.queries)
        state = self._state_plainly if pocket else self._state
        needles = [(rng.random(), state(key, value)) for key in held for value in held[key]]
        context, most = self._context(rng, sources, needles, map(state, keys, values))
        frame, prefix = self._ask_plainly(asked) if pocket else self._ask(asked)
        return Draft(
            tuple(value for key in asked for value in held[key]),
            lambda pieces: frame[0] + context(pieces) + frame[1],
            prefix,
            None if most is None else most - len(held),
        )

    def _state(self, key: str, value: str) -> str:
        return _NEEDLE.format(values=self.value_kind, key=key, value=value)

    def _ask(self, asked: Sequence[str]) -> tuple[tuple[str, str], str]:
        """The text before and after the context, and the answer prefix."""
        one = self.queries * self.values == 1
        words = {
            "some": "A" if one else "Some",
            "are": "is" if one else "are",
            "are_all": "is" if one else "are all",
            "values": self.value_kind.removesuffix("s") if one else self.value_kind,
            "query": _listed(asked),
        }
        before, after = (part.format(**words) for part in _HIDDEN.split("{context}"))
        return (before, after), _PREFIX.format(**words)

    def _state_plainly(self, key: str, value: str) -> str:
        return synthetic.kv_statement(key, value, _SECRETS[self.value_kind])

    def _ask_plainly(self, asked: Sequence[str]) -> tuple[tuple[str, str], str]:
        kind = _SECRETS[self.value_kind]
        if self.queries * self.values == 1:
            question = synthetic.kv_question(asked[0], kind)
        else:
            question = synthetic.ask(f"What are the {kind}s of the {_listed(asked)}?")
        text, _, answer = question.rpartition("\n")
        return ("", synthetic.BREAK + text), "\n" + answer

    def _context(
        self, rng: random.Random, sources: Sources, needles: Sequence[tuple[float, str]], others: Iterator[str]
    ) -> tuple[Callable[[int], str], int | None]:
        """A function that makes the context from a number of pieces, and their maximum (``None``: no limit)."""
        if self.haystack == "essays":
            haystack = sources.haystack
            assert haystack is not None  # the command asks for it
            start = haystack.start(rng)
            return lambda words: haystack.bury(start, words, needles), None
        if self.haystack == "noise":
            return lambda sentences: in_noise(sentences, needles), None
        drawn: list[str] = []  # kept, so that more of them always begin with what there was before

        def fill(lines: int) -> str:
            drawn.extend(islice(others, max(lines - len(drawn), 0)))
            return "\n".join(spread(drawn[:lines], needles))

        return fill, None if self.key_kind == "uuids" else COMPOUNDS


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]


def _numbers(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(rng.randint(1_000_000, 9_999_999))


def _uuids(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))
