"""Results on disk: a line of JSON for each sample, whole or not there at all.

A task's results are one file. Where several processes share the run each appends to a part of its own beside it
(``<task>.jsonl.part<rank>``); ``fold`` makes one file of them again, in the order of the samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attention_predictor.predictor.errors import DataError

Record = dict[str, Any]


def read_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """Line numbers and objects of a jsonl file, one at a time.

    Raises:
        DataError: The file can't be read, or a line is no JSON object; names file and line.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # other separators may stand inside a JSON string
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_line(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot read {path}: {reason}") from error


def parse_line(line: str, where: str) -> Record:
    """The object that a line holds; ``where`` names it in errors."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not readable as JSON: {line[:40].strip()!r}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


class Appender:
    """Appends records to a file; after ``append`` returns, the record survives a crash of the machine."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self._file = path.open("ab")

    def append(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def cut_torn_line(path: Path) -> None:
    """Cut what a killed process left of its last line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def part(path: Path, rank: int) -> Path:
    """Where the process of that rank appends its share of ``path``."""
    return path.with_name(f"{path.name}.part{rank}")


def gather(path: Path) -> list[Record]:
    """All records of a task by ``index``, those of its parts included; of one sample's records the last counts."""
    records = {}
    for file in (path, *_parts(path)):
        if file.exists():
            for number, record in read_lines(file):
                if not isinstance(record.get("index"), int):
                    raise DataError(f"{file}, line {number}: expected a number in 'index': not a file of this command")
                records[record["index"]] = record
    return [records[index] for index in sorted(records)]


def fold(path: Path) -> None:
    """Make one file of a task's file and its parts: a line a sample, in order. Safe to be killed at any point."""
    parts = _parts(path)
    for file in (path, *parts):
        cut_torn_line(file)
    text = b"".join(map(_line, gather(path)))
    if parts or (path.exists() and path.read_bytes() != text):
        write_atomically(path, text)
    for file in parts:
        file.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.part*"))


def _line(record: Record) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
