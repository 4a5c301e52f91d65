"""RULER's scores: which reference answers a prediction contains (``string_match_all`` and ``string_match_part``)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attention_predictor.eval.benchmarks.ruler.families import FAMILIES
from attention_predictor.eval.harness.predictions import Record

_CONTROL = re.compile(r"[\x00-\x1f]")
AT = "-"  # between a task and the length it is made at


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Each prediction's score from 0 to 1.

    The share of references that it contains, whatever the case; for questions about passages 1 if it contains any.
    """
    any_answer = FAMILIES[family_name(task)].any_answer
    return [0.0 if "error" in one else _match(one["pred"], one["answers"], any_answer) for one in records]


def family_name(task: str) -> str:
    """``vt`` of ``vt-4096``."""
    return task.partition(AT)[0]


def _match(prediction: str, answers: Sequence[str], any_answer: bool) -> float:
    said = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    found = [answer.lower() in said for answer in answers]
    return float(any(found)) if any_answer else sum(found) / len(found)
