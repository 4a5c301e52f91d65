"""The metrics of LongBench, to the last digit what its official scorer gives (THUDM/LongBench, ``metrics.py``).

Each takes a prediction, one reference answer and the task's classes, and gives a score from 0 to 1. Where the official
code does something unexpected, so do these, and say so.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from types import ModuleType

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.longbench.rouge import rouge_l

Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBERS = re.compile(r"\d+")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
# Not all Chinese punctuation: the opening 《 stays, for one, as does the full-width full stop.
_CHINESE_PUNCTUATION = re.compile(
    f"[{re.escape(string.punctuation)}"
    "\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027"  # dashes, quotation marks, ellipsis
    "\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f\ufe4f"  # CJK symbols
    "\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"  # full-width forms
)


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of words, in lower case, without punctuation and articles (SQuAD's)."""
    return _f1(_words(prediction), _words(reference))


def qa_f1_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of words that jieba finds, in lower case, without punctuation."""
    return _f1(_words_zh(prediction), _words_zh(reference))


def rouge(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L."""
    return rouge_l(prediction, reference)


def rouge_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of the words that jieba finds. No Chinese mark ends a sentence here, a Latin full stop does."""
    return rouge_l(" ".join(cut_words(prediction)), " ".join(cut_words(reference)), frames=1)


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes named, if the right one is among them; 0 otherwise.

    Classes that are a part of the right one's name don't count. The official code removes them while it goes through
    the list, and so passes over the one behind each.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] != reference and named[place] in reference:
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the right one, in the same digits."""
    numbers = _NUMBERS.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """``count`` of the paragraph's number in the reference."""
    return count(prediction, _number_behind("Paragraph ", reference))


def retrieval_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """``count`` of the paragraph's number in the reference."""
    return count(prediction, _number_behind("段落", reference))


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity, in whole hundredths, of the reference and the prediction's first line that is code.

    That is the first without ``#``, ``//`` and backquote anywhere in it. What the official code calls edit similarity
    is the ratio of matching blocks of difflib: its requirements name fuzzywuzzy, which computes that unless
    python-Levenshtein is installed beside it.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def cut_words(text: str) -> list[str]:
    """Chinese words, and what stands between them."""
    return list(_jieba().cut(text, cut_all=False))


NEEDING_JIEBA: tuple[Metric, ...] = (qa_f1_zh, rouge_zh)


def check_jieba() -> None:
    """``ConfigError`` if what ``NEEDING_JIEBA`` scores can't be scored here."""
    _jieba()


@cache
def _jieba() -> ModuleType:
    try:
        import jieba
    except ImportError as error:
        raise ConfigError("Chinese tasks are scored with jieba: pip install 'attention-predictor[eval]'") from error
    jieba.setLogLevel(logging.WARNING)  # it tells how it loads its dictionary
    return jieba


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", _PUNCTUATION.sub("", text.lower())).split()


def _words_zh(text: str) -> list[str]:
    cleaned = ("".join(_CHINESE_PUNCTUATION.sub("", word.lower()).split()) for word in cut_words(text))
    return [word for word in cleaned if word]


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = (Counter(predicted) & Counter(expected)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def _number_behind(word: str, reference: str) -> str:
    found = re.search(rf"{word}(\d+)", reference)
    if found is None:
        raise DataError(f"expected {word}… with a number, found {reference[:40]!r}")
    return found[1]
