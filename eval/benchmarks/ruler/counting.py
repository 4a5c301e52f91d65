"""cwe and fwe: the most frequent words of a text."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attention_predictor.eval.benchmarks.haystack import Draft
from attention_predictor.eval.benchmarks.ruler.base import Family, Sources, distinct
from attention_predictor.eval.benchmarks.ruler.words import compounds

SHORT = 4096  # tokens; shorter prompts have no room for the published frequencies of words

_COMMON = (
    "Here is a numbered list of words. Some of them are in it more often than the others. Memorise those.\n{context}\n"
    "Question: Which {count} words are in the list above most often?"
)
_COMMON_PREFIX = " Answer: The top {count} words that appear most often in the list are:"
_FREQUENT = (
    "Below is a text in code. Count how often each coded word is in it; dots stand for nothing.\n{context}\n"
    "Question: Which three coded words does the text above have most often? Leave out the dots, and explain nothing."
)
_FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class CommonWords(Family):
    """cwe: ten words occur more often than all others in a list. A short solved list comes first.

    In prompts below ``SHORT`` tokens they are there 10 times and the others once, else 30 times and 3 times.
    """

    common: int = 10

    new_tokens: ClassVar[int] = 120

    def draft(self, rng: random.Random, sources: Sources, length: int) -> Draft:
        words = list(compounds(rng))
        common, example, others = words[: self.common], words[-self.common :], words[self.common : -2 * self.common]
        often, rarely = (30, 3) if length >= SHORT else (10, 1)
        seed = rng.random()
        shown = self._ask(example, words[-2 * self.common : -self.common], 4, 1, seed)
        solved = shown + self._prefix + " " + _numbered(example) + "\n\n"
        return Draft(
            tuple(common),
            lambda pieces: solved + self._ask(common, others[:pieces], often, rarely, seed),
            self._prefix,
            most=len(others),
        )

    @property
    def _prefix(self) -> str:
        return _COMMON_PREFIX.format(count=self.common)

    def _ask(self, common: Sequence[str], others: Sequence[str], often: int, rarely: int, seed: float) -> str:
        listed = [*common] * often + [*others] * rarely
        random.Random(seed).shuffle(listed)
        return _COMMON.format(context=_numbered(listed), count=self.common)


@dataclass(frozen=True)
class FrequentWords(Family):
    """fwe: coded words with power-law frequencies; the answer is ranks 2 to 4, rank 1 being dots."""

    alpha: float = 2.0
    letters: int = 6
    vocabulary: int = 2000

    new_tokens: ClassVar[int] = 50

    least: ClassVar[int] = 200  # words; with fewer the third and fourth rank could tie

    def draft(self, rng: random.Random, sources: Sources, length: int) -> Draft:
        coded = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=self.letters)), self.vocabulary - 1)
        words = ["." * self.letters, *coded]
        shares = [rank**-self.alpha for rank in range(1, self.vocabulary + 1)]
        total, seed = sum(shares), rng.random()

        def fill(pieces: int) -> str:
            size = self.least + pieces
            text = [word for word, share in zip(words, shares, strict=True) for _ in range(round(size * share / total))]
            random.Random(seed).shuffle(text)
            return _FREQUENT.format(context=" ".join(text))

        return Draft(tuple(coded[:3]), fill, _FREQUENT_PREFIX)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
