"""``Family``, the interface of a task family, and shared helpers: noise, names, statements spread over lines."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from attention_predictor.eval.benchmarks.haystack import Draft, Haystack
from attention_predictor.eval.benchmarks.ruler.passages import Passages

WORDINGS = ("ruler", "pocket")

NOISE = (
    "The rain falls on the hills.",
    "The road goes over them.",
    "A light burns far away.",
    "Nobody comes, and nobody leaves.",
)


@dataclass(frozen=True)
class Sources:
    """The user's texts for task families.

    Attributes:
        haystack: Essays.
        passages: Questions and their passages, by task.
        wording: One of ``WORDINGS``; with ``pocket`` niah uses the pocket model's wording (``synthetic``).
    """

    haystack: Haystack | None = None
    passages: Mapping[str, Passages] = field(default_factory=dict)
    wording: str = WORDINGS[0]


class Family(ABC):
    """One way to make samples.

    Attributes:
        new_tokens: Longest answer.
        any_answer: One reference is enough; else the score is the share of them that was given.
        option: The command's option for the text it needs; ``None`` if it needs none.
    """

    new_tokens: ClassVar[int]
    any_answer: ClassVar[bool] = False

    @property
    def option(self) -> str | None:
        return None

    @abstractmethod
    def draft(self, rng: random.Random, sources: Sources, length: int) -> Draft:
        """A sample for prompts of about ``length`` tokens."""


def spread(lines: list[str], inserted: Sequence[tuple[float, str]]) -> list[str]:
    """Insert lines at their depths, from 0 to 1."""
    places = sorted((round(depth * len(lines)), depth, line) for depth, line in inserted)
    for number, (place, _, line) in enumerate(places):
        lines.insert(place + number, line)
    return lines


def in_noise(sentences: int, inserted: Sequence[tuple[float, str]]) -> str:
    """A number of noise sentences, all of ``NOISE`` on each line, with other lines inserted at their depths."""
    lines = [NOISE[: sentences - first] for first in range(0, sentences, len(NOISE))]
    return "\n".join(spread([" ".join(line) for line in lines], inserted))


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """``count`` distinct names."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[make()] = None
    return list(names)
