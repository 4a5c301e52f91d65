"""Benchmarks with prompts of a set length: as much filler as fits, measured with the model's tokenizer.

A prompt and the longest answer together take as close to the length as whole pieces of filler allow, never more.
Prompts are made when their turn comes: making all of them for each variant would cost more than reading some.
"""

from __future__ import annotations

import hashlib
import json
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from attention_predictor.documents import encode
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.haystack import Draft
from attention_predictor.eval.benchmarks.haystack import Haystack as Haystack
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.prompts import check_chat, prompt_ids
from attention_predictor.eval.harness.runner import Benchmark, Sample

PROBE = 64  # pieces of filler in the first guess of tokens a piece
LEAST_FILLED = 0.9  # share of the length that limited filler must reach


class FixedLengthBenchmark(Benchmark):
    """Samples made from seed, task and number, each filled up to its task's length.

    Args:
        chat: Use the model's chat template: the text is the user's turn, the answer prefix follows it.
        context: Tokens that the model has positions for, if limited.
        count: Samples of each task.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat: bool, context: int | None, count: int, seed: int
    ) -> None:
        if count < 1:
            raise ConfigError(f"--samples {count}: expected at least 1")
        if chat:
            check_chat(tokenizer, "--no-chat gives prompts as they are")
        self.tokenizer, self.chat, self.context, self.count, self.seed = tokenizer, chat, context, count, seed

    @abstractmethod
    def draft(self, task: str, number: int, rng: random.Random) -> Draft:
        """The sample of this number; all randomness comes from ``rng``."""

    @abstractmethod
    def length(self, task: str) -> int:
        """Tokens of prompt and answer."""

    @abstractmethod
    def new_tokens(self, task: str) -> int:
        """Tokens of the answer at most."""

    def stop(self) -> Sequence[int]:
        """Token ids that end an answer, besides the model's."""
        return ()

    def settings(self) -> dict[str, Any]:
        return {"chat": self.chat}

    def samples(self, task: str) -> Iterator[Sample]:
        for number in range(self.count):
            draft = self.drawn(task, number)
            record = {"answers": list(draft.answers), "length": self.length(task)} | dict(draft.record)
            yield Sample(str(number), "", record, {"number": number})

    def check(self, task: str, limit: int | None) -> dict[str, Any]:
        """What the samples are made of, and whether they fit; makes one of them whole.

        Raises:
            ConfigError: The length is more than the model has positions for, or too short for a sample.
            DataError: There is not filler enough.
        """
        length = self.length(task)
        if self.context is not None and length > self.context:
            raise ConfigError(f"length {length}: the model has positions for {self.context} tokens")
        count, digest = min(self.count, limit or self.count), hashlib.sha256()
        for number in range(count):
            draft = self.drawn(task, number)
            least = self._tokens(draft, 0) + self.new_tokens(task)
            if least > length:
                raise ConfigError(
                    f"task {task}: length {length} is too short; a sample without filler has {least} tokens"
                )
            parts = [draft.answers, draft.fill(0), draft.prefix, dict(draft.record)]
            digest.update(json.dumps(parts, sort_keys=True).encode())
        filled = len(self.prompt(task, 0)) + self.new_tokens(task)
        if self.drawn(task, 0).most is not None and filled < LEAST_FILLED * length:
            raise DataError(f"task {task}: its data fill only {filled} of {length} tokens: add more data")
        return {"samples": count, "sha256": digest.hexdigest()}

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        prompt = self.prompt(task, sample.hidden["number"])
        return evaluated.predict(self.tokenizer, prompt, self.new_tokens(task), stop=self.stop())

    def drawn(self, task: str, number: int) -> Draft:
        """The sample of that number, always the same."""
        return self.draft(task, number, random.Random(f"{self.seed}/{task}/{number}"))

    def prompt(self, task: str, number: int) -> list[int]:
        """Its token ids."""
        draft, room = self.drawn(task, number), self.length(task) - self.new_tokens(task)
        return self._ids(draft, most_that_fit(lambda pieces: self._tokens(draft, pieces), room, draft.most))

    def _tokens(self, draft: Draft, pieces: int) -> int:
        return len(self._ids(draft, pieces))

    def _ids(self, draft: Draft, pieces: int) -> list[int]:
        return prefixed_ids(self.tokenizer, draft.fill(pieces), draft.prefix, chat=self.chat)


def paragraph_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of an empty line, which ends an answer without a chat; empty if it takes several tokens."""
    ids = encode(tokenizer, "\n\n")
    return ids if len(ids) == 1 else []


def prefixed_ids(tokenizer: PreTrainedTokenizerBase, text: str, prefix: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt and the beginning of its answer, which in a chat is the assistant's."""
    if chat:
        return prompt_ids(tokenizer, text, chat=True) + encode(tokenizer, prefix.strip())
    return prompt_ids(tokenizer, text + prefix, chat=False)


def most_that_fit(count: Callable[[int], int], limit: int, most: int | None = None) -> int:
    """The largest number of pieces, up to ``most``, with ``count(pieces) <= limit``; ``count(0)`` must be.

    ``count`` grows nearly linearly and costs something, so that the next guess comes from the rate so far. Where it
    falls here and there, as token counts do by one or two, the result still fits, and one more piece does not.
    """
    fits, fits_count = 0, count(0)
    beyond: int | None = None
    beyond_count, rate, tries = 0, 0.0, 0
    while beyond is None or beyond - fits > 1:
        if most is not None and fits >= most:
            return most
        tries += 1
        if beyond is None:
            guess = fits + (max(int((limit - fits_count) / rate), 1) if rate else PROBE)
            guess = guess if most is None else min(guess, most)
        elif tries % 4 == 0:  # bisection, in case the rate misleads
            guess = (fits + beyond) // 2
        else:
            share = (limit - fits_count) / (beyond_count - fits_count)
            guess = min(max(fits + round(share * (beyond - fits)), fits + 1), beyond - 1)
        found = count(guess)
        if found <= limit:
            rate = max((found - fits_count) / (guess - fits), 1e-3)
            fits, fits_count = guess, found
        else:
            beyond, beyond_count = guess, found
    return fits
