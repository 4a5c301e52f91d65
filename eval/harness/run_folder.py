"""The directory of a run: its settings, and the results of every variant.

OUT/run.json               what decides the results, and every session that worked on them
OUT/<variant>/<task>.jsonl a line a sample (``predictions``)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.harness.predictions import Record, fold, gather
from attention_predictor.kinds import is_whole
from attention_predictor.reading import read_json
from attention_predictor.writing import LOCK, json_bytes, locked, write_atomically

COUNTED = ("limit", "samples", "documents")  # settings of older runs that a task's number of samples says
GROWING = ("tasks", "variants")  # a later session may add entries


class RunFolder:
    """A run's directory, for writing and reading results.

    ``description`` has ``benchmark``, ``settings``, ``tasks`` and ``variants``, the last two by name.

    Raises:
        ConfigError: ``run.json`` is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description: dict[str, Any] = {}
        self.sessions: list[dict[str, Any]] = []
        if self.file.exists():
            try:
                saved = read_json(self.file)
                self.sessions = list(saved.pop("sessions"))
                self.description = {name: saved[name] for name in ("benchmark", "settings", *GROWING)}
                _check_kinds(**self.description)
                for name in COUNTED:
                    self.description["settings"].pop(name, None)
            except DataError as error:
                raise ConfigError(f"{self.file} is not the description of a run: {error}") from error
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{self.file} is not the description of a run: {error!r}") from error

    @classmethod
    def finished(cls, path: Path) -> RunFolder:
        """A run to read; ``ConfigError`` if there is none."""
        folder = cls(path)
        if not folder.description:
            raise ConfigError(f"{path} is not the directory of a run: no {folder.file.name} in it")
        return folder

    @property
    def file(self) -> Path:
        return self.path / "run.json"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.description["tasks"])

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.description["variants"])

    def results(self, variant: str, task: str) -> Path:
        """Where a variant's results of a task are."""
        return self.path / variant / f"{task}.jsonl"

    def records(self, variant: str, task: str) -> list[Record]:
        """Results so far, in the order of the samples."""
        return gather(self.results(variant, task))

    def check(self, description: Mapping[str, Any]) -> None:
        """Check that the directory belongs to this run; changes nothing.

        Raises:
            ConfigError: Names the first setting that differs, what it is there and what was asked for.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--out {self.path} is not a directory")
        if not self.description:
            if self.path.is_dir() and {one.name for one in self.path.iterdir()} - {LOCK, self.file.name + ".draft"}:
                raise ConfigError(f"--out {self.path} is not empty and not the directory of a run: choose another")
            return
        for name, value in description.items():
            before = self.description[name]
            if name in GROWING:
                both = [key for key in value if key in before]
                before, value = {key: before[key] for key in both}, {key: value[key] for key in both}
            if difference := _difference(name, before, value):
                where, found, asked = difference
                raise ConfigError(
                    f"--out {self.path} holds another run: {where} is {found!r} there, asked for {asked!r}: "
                    "choose another directory"
                )

    @contextmanager
    def opened(self, description: Mapping[str, Any], session: dict[str, Any]) -> Iterator[None]:
        """Lock the directory for one run, and add the session to run.json.

        Raises:
            ConfigError: Another run is writing to it, or it can't be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {self.path} can't be written to: {error.strerror or error}") from error
        with locked(self.path):
            grown = {name: self.description.get(name, {}) | dict(description[name]) for name in GROWING}
            self.description = dict(description) | grown
            self.sessions.append(session)
            write_atomically(self.file, json_bytes(self.description | {"sessions": self.sessions}, indent=1))
            yield

    def fold(self) -> None:
        """Merge the parts of several processes, or of an interrupted one, into one file for each task."""
        for variant in self.variants:
            for task in self.tasks:
                fold(self.results(variant, task))


def _check_kinds(benchmark: Any, settings: Any, tasks: Any, variants: Any) -> None:
    """``TypeError`` where a description has not the form that it is written in."""
    objects = [settings, tasks, variants]
    objects += [one for known in (tasks, variants) if isinstance(known, dict) for one in known.values()]
    are_objects = all(isinstance(one, dict) for one in objects)
    if not are_objects or not all(is_whole(one.get("samples")) for one in tasks.values()):
        raise TypeError("expected objects of settings, tasks and variants, and of each task its samples")


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """Name of the first difference between two values, with both values; ``None`` if equal."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*now, *before)):
            if difference := _difference(f"{name}.{key}", before.get(key), now.get(key)):
                return difference
        return None
    return None if before == now else (name, before, now)
