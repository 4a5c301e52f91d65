"""Documents to record and evaluate: text files, rows of jsonl and parquet files, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_predictor.errors import DataError, one_line
from attention_predictor.reading import BYTE_ORDER_MARK, check_unicode, parse_json, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".parquet")
LONGBENCH = ("context", "input")  # a LongBench sample: the document, then the question about it


@dataclass(frozen=True)
class Document:
    """A text.

    ``place`` is where its window begins if it is too long, as a share of what can be left out; 1 keeps the end.
    Documents of one ``group`` are kept for validation together, since they may overlap. ``continuations`` are texts
    that each follow it by themselves, such as questions with their answers.
    """

    name: str
    group: str
    text: str
    place: float
    continuations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Excerpt:
    """The part of a document that is used, as token ids.

    The prompt is prefilled once; each tail is decoded after it, separately. All tails have the same length.
    """

    prompt: list[int]
    tails: list[list[int]]

    @classmethod
    def cyclic(cls, prompt: list[int], tails: list[list[int]], longest: int | None = None) -> Excerpt:
        """Extend shorter tails by the other tails, so that every step is a token of a tail."""
        turned = (chain(tails[number:], tails[:number]) for number in range(len(tails)))
        endless = [list(chain.from_iterable(each)) for each in turned]
        length = min(max(map(len, tails)) if longest is None else longest, *map(len, endless))
        return cls(prompt, [ids[:length] for ids in endless])


def read_documents(source: str, *, per_file: int, limit: int | None, field: str = "text") -> Iterator[Document]:
    """Documents of a file, of all such files of a directory, or of a data set of the hub.

    A .txt file gives ``per_file`` documents from places spread over it. A row gives one, its text being the column
    ``field`` or, for LongBench samples, ``context`` and ``input``; its end is kept when it is too long, since that is
    where questions stand. It may have ``continuations``, a list of texts that each follow it.

    A data set of the hub is named ``owner/name``, ``owner/name:split`` or ``owner/name/config:split`` and read as a
    stream; old ones have no owner.

    Raises:
        DataError: Names the file and line, or the data set, and what was expected.
    """
    path = Path(source)
    documents = _of_files(path, per_file, field) if path.exists() else _of_hub(source, field)
    return islice(documents, limit)


def excerpt(document: Document, tokenizer: PreTrainedTokenizerBase, max_tokens: int, tail: int) -> Excerpt:
    """At most ``max_tokens`` tokens: a prompt and either its continuations or the text's own last ``tail`` tokens."""
    tails = [encode(tokenizer, text) for text in document.continuations]
    longest = min(max((len(ids) for ids in tails), default=0), tail)
    start = opening(tokenizer)
    ids = start + window(document, tokenizer, max_tokens - longest - len(start))
    return Excerpt.cyclic(ids, tails, longest) if tails else Excerpt(ids[:-tail], [ids[-tail:]])


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that starts every prompt of this model, if any."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a piece of text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def window(document: Document, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[int]:
    """At most ``max_tokens`` token ids of the document."""
    # Only a window of characters is tokenised: no token is shorter than a character, and few are longer than 16.
    spare = max(len(document.text) - 16 * max_tokens, 0)
    start = int(document.place * spare)
    ids = encode(tokenizer, document.text[start : start + 16 * max_tokens])
    left = max(len(ids) - max_tokens, 0)
    first = int(document.place * left)
    return ids[first : first + max_tokens]


def _of_files(path: Path, per_file: int, field: str) -> Iterator[Document]:
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no {', '.join(SUFFIXES)} file in {path}")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file}: expected a {', '.join(SUFFIXES)} file, or a directory of such files")
        # Unique within the directory, since a document with a known name counts as recorded.
        name = _in_utf8(file.relative_to(path if path.is_dir() else path.parent).as_posix())
        if file.suffix == ".txt":
            text = read_text(file)
            for part in range(per_file):
                yield Document(f"{name}#{part}", name, text, part / max(per_file - 1, 1))
        else:
            rows = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file)
            yield from _of_rows(name, rows, str(file), field)


def _in_utf8(name: str) -> str:
    """The name of a file as valid text; on some systems names may be any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


# A row, and its position in its file or data set.
Rows = Iterator[tuple[str, Any]]


def _jsonl(file: Path) -> Rows:
    # Not splitlines: JSON strings may contain other line separators, such as U+2028.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip().lstrip(BYTE_ORDER_MARK):
            yield f"line {number}", parse_json(line, f"{file}, line {number}")


def _parquet(file: Path) -> Rows:
    datasets = import_datasets()
    number = 0
    try:
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        for number, row in enumerate(rows, 1):  # its number, for errors
            yield f"row {number}", row
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, row {number + 1} or a later one: not UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as parquet ({one_line(error)})") from error


def _of_hub(source: str, field: str) -> Iterator[Document]:
    path, _, split = source.partition(":")
    parts = path.split("/", 2)
    if not all(parts) or path.endswith(SUFFIXES):
        raise DataError(f"{source}: neither a file, nor a directory, nor a hub data set ([owner/]name:split)")
    name, config = "/".join(parts[:2]), "".join(parts[2:])
    datasets = import_datasets()
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _of_rows(source, ((f"row {number}", row) for number, row in enumerate(rows, 1)), source, field)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(
            f"{source}: no such file or directory, and the hub could not provide such a data set: {one_line(error)}"
        ) from error


def _of_rows(origin: str, rows: Rows, source: str, field: str) -> Iterator[Document]:
    for number, (place, row) in enumerate(rows, 1):
        name, where = f"{origin}#{number}", f"{source}, {place}"
        text, continuations = _text(row, where, field), _continuations(row, where)
        for one in (text, *continuations):
            check_unicode(one, where)
        yield Document(name, name, text, 1.0, continuations)


def _text(row: Any, where: str, field: str) -> str:
    if isinstance(row, Mapping):
        if isinstance(row.get(field), str):
            return row[field]
        if all(isinstance(row.get(column), str) for column in LONGBENCH):
            return "\n\n".join(row[column] for column in LONGBENCH)
    found = f"columns {', '.join(row)}" if isinstance(row, Mapping) else repr(row)[:40]
    columns = " and ".join(LONGBENCH)
    raise DataError(f"{where}: expected text in {field!r} (--field), or LongBench's {columns}; found {found}")


def _continuations(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = row.get("continuations")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise DataError(f"{where}: expected a list of texts in 'continuations'; found {found!r:.60}")
    return tuple(found)


def import_datasets() -> Any:
    """The library datasets; ``DataError`` where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("this data needs datasets: pip install 'attention-predictor[train]'") from error
    return datasets
