"""qa: questions about passages."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from attention_predictor.eval.benchmarks.haystack import Draft
from attention_predictor.eval.benchmarks.ruler.base import Family, Sources

QA_OPTIONS = {"qa_1": "--squad", "qa_2": "--hotpotqa"}

_ASKED = (
    "Some documents follow, and a question. Give the answer that the documents have, and no other words.\n\n{context}"
    "\n\nGive the answer to this question that the documents above have, and no other words.\n\nQuestion: {question}"
)


@dataclass(frozen=True)
class QuestionAnswering(Family):
    """A question's passages among passages of other questions."""

    task: str

    new_tokens: ClassVar[int] = 32
    any_answer: ClassVar[bool] = True

    @property
    def option(self) -> str | None:
        return QA_OPTIONS[self.task]

    def draft(self, rng: random.Random, sources: Sources, length: int) -> Draft:
        passages = sources.passages[self.task]
        asked = passages.questions[rng.randrange(len(passages.questions))]
        others = [one for one in passages.paragraphs if one not in asked.paragraphs]
        rng.shuffle(others)
        seed = rng.random()

        def fill(pieces: int) -> str:
            documents = [*asked.paragraphs, *others[:pieces]]
            random.Random(seed).shuffle(documents)
            context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
            return _ASKED.format(context=context, question=asked.question)

        return Draft(asked.answers, fill, " Answer:", len(others))
