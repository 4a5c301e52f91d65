"""Documents to record, from every kind of source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from attention_predictor.documents import Document, excerpt, read_documents
from attention_predictor.errors import DataError


def read(source: Path | str, **settings: Any) -> list[Document]:
    return list(read_documents(str(source), **({"per_file": 2, "limit": None} | settings)))


def test_a_directory_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "deep" / "a.txt").write_text("others")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"context": "long", "input": "why?", "answers": ["so"]}\n')
    datasets.Dataset.from_dict({"text": ["three", "four"]}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "notes.md").write_text("not taken")
    documents = read(tmp_path)
    texts = {document.name: document.text for document in documents}
    assert len(texts) == len(documents) == 8  # every name once
    assert texts["a.jsonl#2"] == "long\n\nwhy?"
    assert texts["a.parquet#2"] == "four"
    assert [document.place for document in documents if document.group == "deep/a.txt"] == [0.0, 1.0]
    assert [document.name for document in read(tmp_path, limit=3)] == [document.name for document in documents[:3]]


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "this", "text": "that"}))
    assert read(tmp_path / "a.jsonl", field="prompt")[0].text == "this"


def test_lines_of_jsonl_end_with_line_feeds_alone(tmp_path: Path) -> None:
    rows = ['{"text": "one\u2028and\x85one"}', "", '{"text": "two"}\r', "  ", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = {document.name: document.text for document in read(tmp_path / "a.jsonl")}
    assert found == {"a.jsonl#1": "one\u2028and\x85one", "a.jsonl#2": "two"}


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_excerpts(tmp_path: Path) -> None:
    rows = [{"text": "abcdefgh"}, {"text": "abcdefgh", "continuations": ["123", "45678"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def taken(number: int, **sizes: int) -> tuple[str, ...]:
        found = excerpt(read(tmp_path / "a.jsonl")[number], Letters(), **sizes)  # type: ignore[arg-type]
        return tuple("".join(map(chr, ids)) for ids in (found.prompt, *found.tails))

    assert taken(0, max_tokens=6, tail=2) == ("cdef", "gh")  # the end of the text
    # Continuations replace it; a short one goes on with the next, a long one is cut.
    assert taken(1, max_tokens=10, tail=8) == ("defgh", "12345", "45678")
    assert taken(1, max_tokens=10, tail=4) == ("cdefgh", "1234", "4567")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs["split"], kwargs["streaming"]))
        return iter([{"text": str(number)} for number in range(1000)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read("owner/name/config:test", limit=3)
    assert [document.name for document in documents] == [f"owner/name/config:test#{n}" for n in (1, 2, 3)]
    read("owner/name", limit=1)
    read("wikitext:test", limit=1)
    assert asked == [
        ("owner/name", "config", "test", True),
        ("owner/name", None, "train", True),
        ("wikitext", None, "test", True),
    ]


REFUSED = {
    "nowhere": (None, "no such file or directory, and the hub could not provide such a data set"),
    "nowhere.txt": (None, "neither a file, nor a directory, nor a hub data set"),
    "/nowhere": (None, "neither a file, nor a directory, nor a hub data set"),
    "a.md": ("x", "expected a .txt, .jsonl, .parquet file"),
    "a.jsonl": ("\n{", "line 2: not readable as JSON"),
    "b.jsonl": ('\n\n{"words": "x"}', r"line 3: expected text in 'text' \(--field\), .*; found columns words"),
    "c.jsonl": ("[1]", r"found \[1\]"),
    "d.jsonl": ('{"text": "x", "continuations": 1}', r"line 1: expected a list of texts in 'continuations'; found 1"),
    "e.jsonl": ('{"text": "x", "continuations": [""]}', r"found \[''\]"),
    "a.parquet": ("text", "not readable as parquet"),
    "a.txt": (b"\xff\xfe\xff", "cannot read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name if content is not None else name)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer() -> None:
    with pytest.raises(DataError, match="the hub could not provide such a data set"):  # HF_HUB_OFFLINE, as in all tests
        read("owner/name", limit=1)
