"""Writes files atomically, with errors of one line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attention_predictor.errors import ConfigError, WriteError

LOCK = ".lock"


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8.

    A lone surrogate, which no UTF-8 can hold, is written as JSON's own escape: the file stays valid, and what is read
    back is the same.
    """
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "backslashreplace")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file atomically: a reader sees the old content or the new one.

    Raises:
        WriteError: Names the file and the reason; the old file is as it was.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: none is replaced before all are on the disk."""
    drafts = {path: path.with_name(path.name + ".draft") for path in files}
    try:
        for path, data in files.items():
            with writing(path), drafts[path].open("wb") as file:
                file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for path, draft in drafts.items():
            with writing(path):
                draft.replace(path)
    except BaseException:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink()
        raise


def why_not_writable(path: Path, *, folder: bool = False) -> str | None:
    """Why no file can be written here, or in this ``folder``; ``None`` if it may be. Makes nothing."""
    if path.is_dir() and not folder:
        return "it is a directory"
    above = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not above.is_dir() and (folder or above != path.absolute()):
        return f"{above} is not a directory"
    return None if os.access(above, os.W_OK) else f"{above} can't be written to"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other commands from writing to a directory that exists.

    Raises:
        ConfigError: Another one is, or no file can be written there.
    """
    try:
        lock = (directory / LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"--out {directory} can't be written to: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"--out {directory}: another run is writing to it") from error
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing this file into a ``WriteError`` that names it."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror or error}") from error
