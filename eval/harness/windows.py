"""Windows: prompts and tails of the documents that ``--data`` names, as token ids."""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from attention_predictor.commands.window_options import check_window
from attention_predictor.documents import Document, Excerpt, excerpt, read_documents
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.prompts import check_context
from attention_predictor.eval.harness.runner import Benchmark, Sample
from attention_predictor.loading import load_tokenizer

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Documents under one name.

    Attributes:
        name: The task's name.
        places: Files, directories or data sets of the hub.
    """

    name: str
    places: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Source:
        """``[name=]place``; a place with ``*`` or ``?`` is all files that match.

        Raises:
            ConfigError: The name can't name a file.
            DataError: Nothing matches.
        """
        name, _, place = text.rpartition("=")
        places = tuple(sorted(glob.glob(place))) if set("*?") & set(place) else (place,)
        if not places:
            raise DataError(f"--data {text}: no file matches {place}")
        name = name or Path(place).stem
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--data {text}: {name!r} can't name a task: give it a name (name={place})")
        return cls(name, places)

    def documents(self, per_file: int) -> Iterator[Document]:
        """Of all places, each named as ``read_documents`` names it."""
        for place in self.places:
            yield from read_documents(place, per_file=per_file, limit=None)


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """``ConfigError`` if two have one name."""
    sources = [Source.parse(text) for text in texts]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"--data: names must differ, got {', '.join(names)} (name=place)")
    return sources


@dataclass(frozen=True)
class Windows:
    """Parts of documents of a set length: a prompt, and the tail decoded after it.

    Attributes:
        context: Tokens of both.
        tail: Tokens decoded.
        per_file: Parts of a text file, from places spread over it.
        continuations: Rows that have them are taken as they are, their continuations as tails, where they are short
            too; else all are text.
    """

    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerBase
    context: int
    tail: int
    per_file: int = 1
    continuations: bool = False

    def __post_init__(self) -> None:
        check_window(self.context, self.tail)
        if self.per_file < 1:
            raise ConfigError(f"--per-file {self.per_file}: expected at least 1")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def of(self, name: str) -> Iterator[tuple[str, Excerpt]]:
        """Name and token ids of every part of a source; documents that are too short are skipped."""
        for document in self._documents(name):
            found = excerpt(document, self.tokenizer, self.context, self.tail)
            if document.continuations or len(found.prompt) + self.tail == self.context:
                yield document.name, found

    def check(self, name: str, limit: int | None) -> int:
        """How many documents of a source are too short; ``DataError`` if all of them are."""
        long = sum(1 for _ in islice(self.of(name), limit))
        if not long:
            raise DataError(f"--data {name}: no document has {self.context} tokens (--context)")
        return 0 if limit == long else sum(1 for _ in self._documents(name)) - long

    def _documents(self, name: str) -> Iterator[Document]:
        (source,) = (one for one in self.sources if one.name == name)
        for document in source.documents(self.per_file):
            yield document if self.continuations else replace(document, continuations=())


class WindowBenchmark(Benchmark):
    """A benchmark over windows: a task for each source, a sample for each window.

    A sample's ``hidden`` has ``prompt`` and ``tails`` as token ids, since a part's text may tokenise differently at its
    edges.
    """

    missing: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, windows: Windows) -> None:
        self.windows, self.tasks = windows, windows.names

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.windows, name) for name in ("context", "tail", "per_file")}

    def samples(self, task: str) -> Iterator[Sample]:
        for name, part in self.windows.of(task):
            yield Sample(name, "", {}, {"prompt": part.prompt, "tails": part.tails})


def windows_of(args: argparse.Namespace, *, continuations: bool = False) -> Windows:
    """Windows from the command's options; reads each source once and prints how many documents are too short.

    Raises:
        ConfigError: More ``--context`` than the model has positions for, or another argument that is not allowed.
        DataError: A source can't be read, or has no document that is long enough.
    """
    check_context(args.model, args.context)
    tokenizer = load_tokenizer(args.model)
    sources = parse_sources(args.data)
    windows = Windows(sources, tokenizer, args.context, args.tail, args.per_file, continuations=continuations)
    for name in windows.names:
        if (short := windows.check(name, args.limit)) and Processes().is_main:
            print(f"{name}: {short} documents have fewer than {args.context} tokens and are skipped")
    return windows
