"""Reads questions and their passages from SQuAD and HotpotQA rows (JSON lines)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_predictor.errors import DataError
from attention_predictor.reading import check_unicode, read_lines


@dataclass(frozen=True)
class Question:
    """A question, its answers, any of which is right, and the passages that have it."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


class Passages:
    """Questions of a file, and all paragraphs in it, each once.

    A line has ``question``; ``answers`` (a list, or SQuAD's ``{"text": [...]}``) or ``answer``; and ``context``: a text
    (SQuAD), a list of texts, a list of ``[title, [sentence, ...]]`` or ``{"title": [...], "sentences": [[...], ...]}``
    (HotpotQA). Questions without an answer, which SQuAD 2 has, are passed over; their paragraphs count.

    Raises:
        DataError: Names file, line and field; or there is no question, or but one paragraph.
    """

    def __init__(self, path: Path) -> None:
        questions, paragraphs = [], dict[str, None]()
        for number, row in read_lines(path):
            where = f"{path}, line {number}"
            found = _paragraphs(row, where)
            paragraphs.update(dict.fromkeys(found))
            answers = _answers(row, where)
            if not isinstance(row.get("question"), str):
                raise DataError(f"{where}: expected a text in 'question'; found fields {', '.join(row)}")
            for text in (row["question"], *found):
                check_unicode(text, where)
            if answers:
                questions.append(Question(row["question"].strip(), answers, found))
        if not questions:
            raise DataError(f"{path}: no question with an answer in it")
        if len(paragraphs) < 2:
            raise DataError(f"{path}: has only one paragraph; expected at least two")
        self.questions, self.paragraphs = questions, list(paragraphs)

    @property
    def sha256(self) -> str:
        """Digest of the data."""
        every = [[one.question, one.answers, one.paragraphs] for one in self.questions]
        return hashlib.sha256(json.dumps([every, self.paragraphs]).encode()).hexdigest()


def _answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = row.get("answers", row.get("answer"))
    if isinstance(found, Mapping):
        found = found.get("text")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise DataError(f"{where}: expected a list of texts in 'answers', or a text in 'answer'; found {found!r:.40}")
    return tuple(dict.fromkeys(one for one in found if one.strip()))


def _paragraphs(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    context = row.get("context")
    if isinstance(context, str):
        context = [context]
    if isinstance(context, Mapping) and isinstance(context.get("title"), list):
        sentences = context.get("sentences")
        context = list(zip(context["title"], sentences, strict=False)) if isinstance(sentences, list) else None
    if not isinstance(context, list) or not context:
        raise DataError(f"{where}: expected a text, or a list of passages, in 'context'; found {context!r:.40}")
    return tuple(_passage(one, where) for one in context)


def _passage(passage: Any, where: str) -> str:
    if isinstance(passage, str):
        return passage.strip()
    match passage:
        case [str(title), [*sentences]] if all(isinstance(one, str) for one in sentences):
            return f"{title}\n{''.join(sentences).strip()}"
    raise DataError(f"{where}: expected texts, or [title, [sentences]], in 'context'; found {passage!r:.40}")
