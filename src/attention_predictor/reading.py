"""Reads text and JSON files in UTF-8, with or without a byte-order mark.

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
MAX_DEPTH = 100  # nesting of lists and objects; deeper JSON could be read, but not written again

Row = dict[str, Any]


def read_text(path: Path, what: str = "") -> str:
    """The text of a file, with line ends ``\\n``; ``what`` describes the file in errors."""
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
    """Decode bytes; ``name`` is their source in errors."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name}: {_not_utf8(data, error)}") from error


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    line = data.count(b"\n", 0, error.start) + 1
    return f"not UTF-8 text (line {line})"


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
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
    """Yield line numbers and objects of a jsonl file; empty lines are skipped."""
    try:
        with path.open("rb") as file:  # split at line feeds only: JSON strings may contain other separators
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
    """Parse a line that holds an object; ``where`` names it in errors."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def parse_json(text: str, where: str) -> Any:
    """Parse any JSON; ``where`` names it in errors."""
    too_deep = f"{where}: not readable as JSON: nested more than {MAX_DEPTH} levels deep"
    try:
        value = json.loads(text.lstrip(BYTE_ORDER_MARK))
    except RecursionError as error:
        raise DataError(too_deep) from error
    except ValueError as error:
        raise DataError(f"{where}: not readable as JSON: {text[:SHOWN].strip()!r}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise DataError(too_deep)
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a value's lists and objects are nested deeper than ``levels``."""
    level = [value]
    for _ in range(levels + 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [child for children in inner for child in children]
    return bool(level)


def check_unicode(text: str, where: str) -> str:
    """Return the text; ``DataError`` for a lone surrogate, which tokenizers can't process."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not Unicode text, a lone surrogate: {text[error.start]!a}") from error
    return text
