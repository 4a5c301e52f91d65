"""Reads what others wrote: text and JSON, in UTF-8, with or without a byte-order mark.

Every error is a ``DataError`` of one line that names the file and, where there is one, the line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attention_predictor.errors import DataError

BYTE_ORDER_MARK = "\ufeff"
SHOWN = 40  # characters of a line, in errors
DEEPEST = 100  # levels of lists and objects within each other; what is deeper could be read, but not written again

Row = dict[str, Any]


def read_text(path: Path, what: str = "") -> str:
    """A text file, its line ends as ``\\n``; ``what`` it is comes before its name in errors."""
    named = f"{what} {path}".lstrip()
    try:
        return decoded(path.read_bytes(), named).replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise DataError(f"cannot read {named}: {error.strerror or error}") from error


def read_standard_input() -> str:
    """All of standard input."""
    binary = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if binary is None else decoded(binary.read(), "standard input")


def decoded(data: bytes, name: str) -> str:
    """Text of bytes; ``name`` says in errors where they are from."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name}: {_not_utf8(data, error)}") from error


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    return f"not UTF-8 text (line {line})"


def read_json(path: Path) -> Any:
    """A file of JSON."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: not readable as JSON: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not readable as JSON: {_not_utf8(data, error)}") from error
    return parse_json(text, str(path))


def read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers and objects of a jsonl file, one at a time; empty lines are passed over."""
    try:
        with path.open("rb") as file:  # by line feeds alone: other separators may stand inside a JSON string
            for number, data in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    line = data.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"cannot read {path}: not UTF-8 text (line {number})") from error
                if line.strip().lstrip(BYTE_ORDER_MARK):
                    yield number, parse_row(line, where)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def parse_row(line: str, where: str) -> Row:
    """The object that a line holds; ``where`` names it in errors."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def parse_json(text: str, where: str) -> Any:
    """Any JSON; ``where`` names it in errors."""
    too_deep = f"{where}: not readable as JSON: nested more than {DEEPEST} levels deep"
    try:
        value = json.loads(text.lstrip(BYTE_ORDER_MARK))
    except RecursionError as error:
        raise DataError(too_deep) from error
    except ValueError as error:
        raise DataError(f"{where}: not readable as JSON: {text[:SHOWN].strip()!r}") from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value, DEEPEST):
        raise DataError(too_deep)
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a value has more levels of lists and objects within each other."""
    level = [value]
    for _ in range(levels + 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [child for children in inner for child in children]
    return bool(level)


def check_unicode(text: str, where: str) -> str:
    """The text itself; ``DataError`` for a lone surrogate, of which a tokenizer can make nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not Unicode text, a lone surrogate: {text[error.start]!a}") from error
    return text
