"""TimingsFile: rows of a sweep, appended one by one, so that an interrupted sweep resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.reading import parse_row, read_text
from attention_predictor.writing import json_bytes, write_atomically, writing


class TimingsFile:
    """JSON lines: the settings first, then a row each.

    Raises:
        ConfigError: The file has rows of other settings, whose ratios to these would mean nothing.
        DataError: The file is not a file of timings. (A last line that was cut off in the writing is dropped.)
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, writes: bool = True) -> None:
        """Without a path, keep rows in memory only; unless it ``writes``, this process only reads the file."""
        self.path = path if writes else None
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, settings)
        elif writes:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json_bytes({"settings": dict(settings)}) + b"\n")

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The row with these values, if there is one."""
        return next((row for row in self.rows if fields.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; one that was ``skipped`` is not written, so that another run tries again."""
        self.rows.append(row)
        if self.path is not None and "skipped" not in row:
            with writing(self.path), self.path.open("ab") as file:
                file.write(json_bytes(row) + b"\n")

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        text = read_text(path)
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = enumerate(whole.split("\n")[:-1], 1)
            first, *self.rows = (parse_row(line, f"{path}, line {number}") for number, line in lines)
            found = first["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"--out {path} is not a file of timings: {error!r}") from error
        wanted = json.loads(json.dumps(dict(settings)))
        for name in found | wanted:
            if found.get(name) != wanted.get(name):
                raise ConfigError(
                    f"--out {path} holds timings with other settings ({name}: {found.get(name)!r} there, "
                    f"{wanted.get(name)!r} asked for): choose another file"
                )
        if whole != text and self.path is not None:
            write_atomically(path, whole)
