r"""Answers to mathematics problems: extracted from a model's text and compared with the reference.

Answers count as the same where they are the same number, however it is written (``\$1,450,000.00``, ``\frac12`` and
0.5, ``50\%`` and 50), the same LaTeX but for spelling, or lists, intervals and matrices of such. Proving that two
expressions with variables are equal is left out: it needs an algebra system, and answers are wanted in simplest form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from attention_predictor.eval.benchmarks.reasoning.latex import (
    MOST_CHARACTERS,
    ROW_BREAK,
    SET_CLOSE,
    SET_OPEN,
    Number,
    normalise,
    value,
)

CLOSE = 1e-9  # relative, where a root or π makes numbers inexact

_NUMBER = re.compile(
    r"(?<![\w.)])[-−]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?\d+/\d+|/\d+)?|(?<![\w.)])[-−]?\.\d+"
)
_SAID = re.compile(r"answer\b[^\n.:=]{0,40}?(?:\bis\b|:|=)\s*:?[ \t]*\n?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_MARKED = re.compile(r"####\s*([-−]?\$?[\d,]*\.?\d+%?)\s*$", re.MULTILINE)  # and no heading of that level
_BOX, _BRACE = re.compile(r"\\(?:boxed|fbox)\s*"), re.compile(r"(?<!\\)[{}]")
_THOUGHT = "</think>"
_MATRIX = re.compile(r"\\begin\{([pbv]?matrix)\}(.*)\\end\{\1\}")
_BRACKETS = {"(": ")]", "[": ")]", SET_OPEN: SET_CLOSE}


def find_answer(text: str, *, numeric: bool) -> str | None:
    r"""The final answer in a model's text, verbatim; ``None`` if there is none.

    In this order: the last ``\boxed{…}``; the text after the last ``####``; the last "the answer is …"; the
    last number, or for answers that need not be numbers the last formula.

    Args:
        numeric: Answers are numbers; other words around one are dropped.
    """
    thought, _, said = text.rpartition(_THOUGHT)
    text = said if said.strip() else thought or text
    for candidates in (_boxed(text), _marked(text), _said(text)):
        found = next((one for one in candidates if one.strip()), None)
        if found is None:
            continue
        if not numeric or value(normalise(found).rstrip("%")) is not None:
            return found.strip()
        if number := _NUMBER.search(found.rpartition("=")[2]) or _NUMBER.search(found):
            return number[0].strip()
    if not numeric and (formulas := list(_FORMULA.finditer(text))):
        return next(part for part in formulas[-1].groups() if part).strip()
    numbers = _NUMBER.findall(text.replace("**", ""))
    return numbers[-1].strip() if numbers else None


def same_answer(found: str | None, reference: str) -> bool:
    """Whether an answer equals the reference."""
    return found is not None and _same(normalise(found), normalise(reference))


def _boxed(text: str) -> Iterator[str]:
    r"""Contents of ``\boxed{…}``, the last first; one that was never closed is no answer."""
    for start in reversed([found.end() for found in _BOX.finditer(text)]):
        rest = text[start : start + MOST_CHARACTERS]
        if not rest.startswith("{"):
            token = re.match(r"[^\s$.,]+", rest)
            if token is not None:
                yield token[0]
            continue
        depth = 0
        for brace in _BRACE.finditer(rest):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                yield rest[1 : brace.start()]
                break


def _marked(text: str) -> Iterator[str]:
    yield from reversed(_MARKED.findall(text))


def _said(text: str) -> Iterator[str]:
    text = text.replace("**", "")
    for found in reversed(list(_SAID.finditer(text))):
        rest = text[found.end() :]
        formula = _FORMULA.match(rest)
        if formula is not None:
            yield next(part for part in formula.groups() if part)
            continue
        end = _SENTENCE_END.search(rest)
        yield rest[: end.start()] if end else rest


def _same(found: str, reference: str) -> bool:
    if found == reference:
        return bool(found)
    if found.isalpha() and reference.isalpha():
        return found.casefold() == reference.casefold()
    if found.endswith("%") or reference.endswith("%"):
        return _same_share(found, reference)
    number, wanted = value(found), value(reference)
    if number is not None and wanted is not None:
        return _close(number, wanted)
    if (cells := _cells(found)) and (wanted_cells := _cells(reference)):
        return _same_rows(cells, wanted_cells)
    (open_, close), parts = _parts(found)
    (wanted_open, wanted_close), wanted_parts = _parts(reference)
    if len(parts) != len(wanted_parts) or (len(parts) == 1 and (parts[0], wanted_parts[0]) == (found, reference)):
        return False
    if open_ in ("(", "["):
        ends_agree = (open_, close) == (wanted_open, wanted_close)
        return ends_agree and all(map(_same, parts, wanted_parts))
    return wanted_open not in ("(", "[") and _same_set(parts, wanted_parts)


def _same_share(found: str, reference: str) -> bool:
    """With a percent sign, which people write and leave out."""
    number, wanted = value(found.rstrip("%")), value(reference.rstrip("%"))
    if number is None or wanted is None:
        return False
    as_shares = (number / 100 if found.endswith("%") else number, wanted / 100 if reference.endswith("%") else wanted)
    return _close(number, wanted) or _close(*as_shares)


def _close(one: Number, other: Number) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=CLOSE)
    return one == other


def _cells(text: str) -> list[list[str]] | None:
    found = _MATRIX.fullmatch(text)
    return [row.split("&") for row in found[2].strip(ROW_BREAK).split(ROW_BREAK)] if found else None


def _same_rows(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> bool:
    if [len(row) for row in found] != [len(row) for row in wanted]:
        return False
    return all(map(_same, chain.from_iterable(found), chain.from_iterable(wanted)))


def _same_set(found: Sequence[str], wanted: Sequence[str]) -> bool:
    left = list(wanted)
    for part in found:
        match = next((one for one in left if _same(part, one)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _parts(text: str) -> tuple[tuple[str, str], list[str]]:
    r"""Brackets around a list, if there are any, and its members; ``a \pm b`` is two."""
    for open_, closing in _BRACKETS.items():
        for close in closing:
            inner = text[len(open_) : len(text) - len(close)]
            if text.startswith(open_) and text.endswith(close) and _is_balanced(inner):
                return (open_, close), _members(inner)
    return ("", ""), _members(re.sub(r",?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ",", text))


def _members(text: str) -> list[str]:
    members, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            members.append(text[start:place])
            start = place + 1
    members.append(text[start:])
    both = []
    for one in members:
        both += [one.replace(r"\pm", sign) for sign in "+-"] if one.count(r"\pm") == 1 else [one]
    return [one.removeprefix("+") for one in both]


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0
