"""Recorded histories on disk: attention scores and mass, step by step, to train predictors on.

A recording is a directory with one parquet shard per document, readable by `datasets`, beside a `meta.json`
that lists them. One table row is one (document, sequence, layer, KV head): its block scores at Q consecutive
steps, as a predictor would see them, and the true block mass at the same steps (`predictor/scores.py` defines both).
Several sequences of a document have the prompt in common, and its rows.

Suffixes: Q steps, N blocks, X records (sequences × layers × KV heads).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from attention_predictor import kinds
from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import DataError, one_line
from attention_predictor.reading import read_json
from attention_predictor.train.shards import Record, Recording, encode, pyarrow_modules, schema, stack
from attention_predictor.writing import json_bytes, write_atomically, writing

FORMAT_VERSION = 3
META_FILE = "meta.json"  # of the first process; the others write meta-1.json, …
SHARDS = "shards"
IDENTITY = ("block_size", "sink", "recent", "model", "rows")  # the same for all documents of a recording
# These too, if given: they decide what a document's rows mean.
SETTINGS = ("max_tokens", "steps", "predictor", "budgets", "per_file", "validation")
LATER = ("per_file", "validation")  # of these, recordings of earlier versions have none
ROW_GROUP = 16  # records written at once, which bounds memory for any number of layers


class HistoryWriter:
    """Adds documents to a recording, each atomically, so that a killed run can be continued.

    Several processes may write at once, each with a `part` of its own and documents of its own.

    `meta` must give block_size, sink, recent (tokens), model and rows ("sparse" or "full"), and may give more: of that
    those named in SETTINGS must, as those five, agree with what the directory already holds. Nothing
    is held before the first document is there.
    """

    def __init__(self, directory: str | os.PathLike[str], meta: Mapping[str, Any], part: int = 0) -> None:
        self.directory, self.file = Path(directory), META_FILE if part == 0 else f"meta-{part}.json"
        missing = [name for name in IDENTITY if name not in meta]
        if missing:
            raise DataError(f"meta of a recording lacks {', '.join(missing)}")
        self.meta: dict[str, Any] = {"format_version": FORMAT_VERSION, **meta, "documents": {}}
        self.others: dict[str, Any] = {}  # documents that other processes have recorded
        for path in meta_files(self.directory):
            found = read_meta_file(path)
            for name in (*IDENTITY, *SETTINGS):
                unknown = name in LATER and name not in found
                if not unknown and found.get(name) != meta.get(name):
                    raise DataError(
                        f"{path}: holds a recording with {name}={found.get(name)!r}, "
                        f"can't add one with {meta.get(name)!r}"
                    )
            if path.name == self.file:
                self.meta = found
            else:
                merge(self.directory, self.others, found["documents"])
        try:
            (self.directory / SHARDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.directory}: can't write a recording here: {error.strerror or error}") from error

    def has(self, document: str) -> bool:
        """Whether the document is recorded and its shard has the recorded size."""
        entries = (parts[document] for parts in (self.meta["documents"], self.others) if document in parts)
        return any(is_whole(self.directory, entry) for entry in entries)

    def write(
        self, document: str, records: Iterable[Record], *, split: str | None = None, group: str | None = None
    ) -> None:
        """Add one document, replacing an existing one.

        `split` "validation" keeps it from training. Documents of a `group` may overlap and are held out together.
        """
        pa, parquet = pyarrow_modules()
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", document)[:60].strip(".-")
        name = f"{slug}-{hashlib.sha256(document.encode()).hexdigest()[:8]}.parquet"
        path = self.directory / SHARDS / name
        partial = path.with_name(f".{name}.partial")
        count, steps, pending = 0, 0, iter(records)
        try:
            with writing(path):
                with parquet.ParquetWriter(partial, schema(pa), compression="zstd") as writer:
                    while chunk := list(islice(pending, ROW_GROUP)):
                        rows = [encode(document, split, record, self.meta["block_size"]) for record in chunk]
                        writer.write_table(pa.Table.from_pylist(rows, schema=schema(pa)))
                        count, steps = count + len(chunk), chunk[0].scores_QN.shape[0]
                if not count:
                    raise DataError(f"document {document!r} has no records")
                size = partial.stat().st_size
                os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        self.meta["documents"][document] = {
            "shard": name,
            "bytes": size,
            "records": count,
            "steps": steps,
            "split": split,
            "group": group,
        }
        self._write_meta()

    def _write_meta(self) -> None:
        write_atomically(self.directory / self.file, json_bytes(self.meta, indent=2) + b"\n")


class HistoryDataset:
    """A recording. Faults raise DataError with one line that names the file.

    `block_size` is what the recording must have, `None` for any.

    Opening it checks `meta.json` and that every shard is whole; the numbers are checked as documents are
    loaded.
    """

    def __init__(self, directory: str | os.PathLike[str], *, block_size: int | None = 16) -> None:
        self.directory = Path(directory)
        self.meta = read_meta(self.directory)
        found = self.meta["block_size"]
        if found != block_size if block_size is not None else not (kinds.is_whole(found) and found > 0):
            expected = "a positive integer" if block_size is None else block_size
            raise DataError(f"{self.directory / META_FILE}: block_size is {found!r}, expected {expected}")
        if not self.meta["documents"]:
            raise DataError(f"{self.directory / META_FILE}: the recording has no documents")
        for entry in self.meta["documents"].values():
            if not is_whole(self.directory, entry):
                path, again = self.directory / SHARDS / entry["shard"], "record again to repair it"
                if not path.is_file():
                    raise DataError(f"{path}: shard is missing; {again}")
                raise DataError(f"{path}: shard has {path.stat().st_size} bytes, expected {entry['bytes']}; {again}")

    @property
    def documents(self) -> list[str]:
        return list(self.meta["documents"])

    def split(self, document: str) -> str | None:
        """The split that was requested when the document was recorded."""
        return self.meta["documents"][document].get("split")

    def group(self, document: str) -> str:
        """The source of the document's text; the document itself if that was not recorded."""
        return self.meta["documents"][document].get("group") or document

    @property
    def fingerprint(self) -> str:
        """A hash that changes when documents are added, removed or recorded again."""
        entries = sorted((name, entry["bytes"], entry.get("split")) for name, entry in self.meta["documents"].items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]

    def load(self, document: str) -> Recording:
        """Read and check one document."""
        pa, parquet = pyarrow_modules()
        entry = self.meta["documents"][document]
        path = self.directory / SHARDS / entry["shard"]
        try:
            table = parquet.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not readable as parquet ({one_line(error)})") from error
        if not set(schema(pa).names) <= set(table.column_names) or table.num_rows != entry["records"]:
            raise DataError(
                f"{path}: found {table.num_rows} rows of columns {table.column_names}, "
                f"expected {entry['records']} rows of {schema(pa).names}"
            )
        rows = table.to_pylist()
        shapes = {(row["first_tokens"], row["steps"], row["blocks"]) for row in rows}
        if len(shapes) != 1:
            raise DataError(f"{path}: records differ in tokens, steps or blocks: {sorted(shapes)}")
        first_tokens, steps, blocks = shapes.pop()
        if steps < 2 or blocks != ceil_div(first_tokens + steps - 1, self.meta["block_size"]):
            raise DataError(f"{path}: {steps} steps from {first_tokens} tokens on do not make {blocks} blocks")
        return Recording(
            document=document,
            first_tokens=first_tokens,
            sequences=[row["sequence"] for row in rows],
            layers=[row["layer"] for row in rows],
            heads=[row["head"] for row in rows],
            scores_XQN=stack(path, rows, "scores", (steps, blocks)),
            mass_XQN=stack(path, rows, "mass", (steps, blocks)),
        )


def meta_files(directory: Path) -> list[Path]:
    """Those of all parts, the first one's first."""
    return sorted(directory.glob("meta*.json"), key=lambda path: (len(path.name), path.name))


def read_meta(directory: Path) -> dict[str, Any]:
    """What all parts say together, with everything that reading needs in place."""
    files = meta_files(directory)
    if not files:
        raise DataError(f"{directory / META_FILE}: file is missing; make a recording with 'attnpred record'")
    meta, *others = [read_meta_file(path) for path in files]
    for path, other in zip(files[1:], others, strict=True):
        for name in IDENTITY:
            if other[name] != meta[name]:
                raise DataError(f"{path}: {name} is {other[name]!r}, in {files[0].name} it is {meta[name]!r}")
        merge(directory, meta["documents"], other["documents"])
    return meta


def merge(directory: Path, documents: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add another part's documents; what one part has lost another may have recorded again."""
    for document, entry in more.items():
        if document not in documents or is_whole(directory, entry):
            documents[document] = entry


def is_whole(directory: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a document's shard is there, as large as `meta.json` says."""
    path = directory / SHARDS / entry["shard"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def read_meta_file(path: Path) -> dict[str, Any]:
    """One part's, checked."""
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version") if isinstance(meta, dict) else meta
        raise DataError(f"{path}: format_version is {found!r}, this release reads {FORMAT_VERSION}")
    missing = [name for name in (*IDENTITY, "documents") if name not in meta]
    entries = meta.get("documents")
    whole = isinstance(entries, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("shard"), str)
        and all(kinds.is_whole(entry.get(name)) for name in ("bytes", "records"))
        for entry in entries.values()
    )
    if missing or not whole:
        raise DataError(f"{path}: not the metadata of a recording; it lacks {', '.join(missing) or 'shard entries'}")
    return meta
