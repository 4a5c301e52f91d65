"""Kinds of problems, and how chains of thought are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.reasoning.prompts import MATHEMATICS, WORD_PROBLEMS


@dataclass(frozen=True)
class Kind:
    """What the problems of a data set have in common.

    Attributes:
        numeric: Answers are numbers.
        max_new_tokens: Longest chain of thought, unless the command says otherwise.
        examples: Solved problems for models without a chat template.
    """

    numeric: bool
    max_new_tokens: int
    examples: tuple[tuple[str, str], ...]


KINDS = {
    "gsm8k": Kind(True, 1024, WORD_PROBLEMS),
    "math": Kind(False, 4096, MATHEMATICS),
    "aime": Kind(True, 16384, MATHEMATICS),
}


@dataclass(frozen=True)
class Sampling:
    """How chains of thought are decoded: greedily at a temperature of 0, else so often, each with its own seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"--temperature {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: expected a share above 0, up to 1")
        if self.repeats < 1:
            raise ConfigError(f"--repeats {self.repeats}: expected at least 1")
        if self.repeats > 1 and not self.temperature:
            raise ConfigError(
                f"--repeats {self.repeats}: greedy decoding gives the same answer each time; set --temperature"
            )

    def options(self) -> dict[str, Any]:
        """For ``EvaluatedModel.generate``."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
