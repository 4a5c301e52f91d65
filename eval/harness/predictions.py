"""Results on disk: one line of JSON for each sample, complete or absent.

A task's results are one file. Where several processes share the run each appends to a part of its own beside it
(``<task>.jsonl.part<rank>``); ``fold`` makes one file of them again, in the order of the samples.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from attention_predictor.errors import DataError
from attention_predictor.kinds import is_whole
from attention_predictor.reading import Row as Record
from attention_predictor.reading import read_lines
from attention_predictor.writing import json_bytes, write_atomically, writing

INDEX = "index"


class Appender:
    """Appends records to a file; after ``append`` returns, the record survives a crash of the machine.

    Where the disk is full ``append`` raises a ``WriteError``. Records before that one stay; what was written of its
    line is cut when the file is next opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            self._file = path.open("ab")

    def append(self, record: Record) -> None:
        with writing(self.path):
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # ``append`` has raised the error already
            self._file.close()


def cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed process."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)


def part(path: Path, rank: int) -> Path:
    """The file that the process of that rank appends to."""
    return path.with_name(f"{path.name}.part{rank}")


def gather(path: Path) -> list[Record]:
    """All records of a task by ``index``, those of its parts included; of one sample's records the last counts."""
    records = {}
    for file in (path, *_parts(path)):
        if file.exists():
            for number, record in read_lines(file):
                index = record.get(INDEX)
                if not is_whole(index):
                    raise DataError(
                        f"{file}, line {number}: expected a number in {INDEX!r}, found {index!r:.40}: "
                        "not a file of this command"
                    )
                records[index] = record
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


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.part*"))


def _line(record: Record) -> bytes:
    return json_bytes(record) + b"\n"
