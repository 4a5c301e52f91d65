"""LongBench's samples: from a directory of jsonl files, the archive on the hub, or a mirror of it there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any

from attention_predictor.documents import import_datasets
from attention_predictor.errors import ConfigError, DataError, one_line
from attention_predictor.eval.benchmarks.longbench.scorer import check_prediction
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.runner import Sample
from attention_predictor.reading import check_unicode, parse_row, read_lines

HUB = "hub"
REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
SUFFIX = "_e"  # suffix of LongBench-E's files

Rows = Callable[
    [str], Iterator[tuple[str, Record]]
]  # name of a file or configuration -> where each row is, and the row


def open_source(source: str) -> Rows:
    """Where ``--data`` says the samples are.

    Args:
        source: A directory with ``<task>.jsonl``; ``hub``, LongBench's own archive; or ``hub:owner/name``, a data set
            of the hub with a configuration for each task and a split ``test``.

    Raises:
        DataError: There is no such directory, or the hub doesn't give it.
    """
    name, _, mirror = source.partition(":")
    if name != HUB:
        if not Path(source).is_dir():
            raise DataError(f"--data {source}: no such directory, and not {HUB} or {HUB}:owner/name")
        return lambda task: _of_folder(Path(source), task)
    if mirror:
        return lambda task: _of_mirror(mirror, task)
    archive = _fetch_archive()
    return lambda task: _of_archive(archive, task)


def make_sample(row: Mapping[str, Any], where: str, number: int, task: str, template: str) -> Sample:
    """One sample, its prompt made; ``DataError`` names the place and the field that is missing or of the wrong kind.

    Args:
        number: Number of the row, its name if it has no ``_id``.
    """
    fields = template_fields(template)
    if absent := [name for name in fields if not isinstance(row.get(name), str)]:
        found = f"{row[absent[0]]!r:.40}" if absent[0] in row else f"fields {', '.join(row)}"
        raise DataError(f"{where}: expected a text in {absent[0]!r}, which the template of {task} needs; found {found}")
    for name in fields:
        check_unicode(row[name], f"{where}, {name!r}")
    record = {name: row.get(name) for name in ("answers", "all_classes", "length")}
    check_prediction(record | {"pred": ""}, task, where, extended=True)
    if not record["answers"]:
        raise DataError(f"{where}: no reference answer in 'answers'")
    return Sample(str(row.get("_id", number)), template.format_map(row), record)


def template_fields(template: str) -> list[str]:
    """Fields that a template asks for; ``ConfigError`` if it is none."""
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"not a template, {error}: {template[:40]!r}") from error


def _of_folder(folder: Path, task: str) -> Iterator[tuple[str, Record]]:
    path = folder / f"{task}.jsonl"
    if not path.exists():
        there = ",".join(sorted(one.stem for one in folder.glob("*.jsonl"))) or "none"
        raise DataError(f"--data {folder}: no {path.name} in it; --tasks chooses among those that are: {there}")
    for number, row in read_lines(path):
        yield f"{path}, line {number}", row


def _of_archive(archive: Path, task: str) -> Iterator[tuple[str, Record]]:
    name = f"data/{task}.jsonl"
    with _opened(archive, name) as file:
        for number, line in enumerate(file, 1):
            where = f"{archive.name}, {name}, line {number}"
            yield where, parse_row(line, where)


@contextmanager
def _opened(archive: Path, name: str) -> Iterator[io.TextIOWrapper]:
    """A file of the archive, unpacked while it is read."""
    try:
        with zipfile.ZipFile(archive) as whole, whole.open(name) as packed:
            yield io.TextIOWrapper(packed, encoding="utf-8-sig", newline="\n")
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: can't read {name} from it: {one_line(error)}") from error


def _of_mirror(name: str, task: str) -> Iterator[tuple[str, Record]]:
    datasets = import_datasets()
    try:
        rows = datasets.load_dataset(name, task, split="test")  # kept on disk: it is read once for each policy
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(f"the hub gives no data set {name}, configuration {task}: {one_line(error)}") from error
    for number, row in enumerate(rows, 1):
        yield f"{name}, {task}, row {number}", dict(row)


def _fetch_archive() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(f"the hub does not give {ARCHIVE} of {REPOSITORY}: {one_line(error)}") from error
