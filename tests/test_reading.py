"""Text and JSON that others wrote: byte-order marks, lone surrogates, whatever is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attention_predictor.errors import DataError, WriteError
from attention_predictor.reading import check_unicode, parse_json, read_json, read_lines, read_text
from attention_predictor.writing import json_bytes, write_atomically, write_together

MARK = b"\xef\xbb\xbf"


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(MARK + b"one\r\ntwo\rthree")
    assert read_text(file) == "one\ntwo\nthree"
    file.write_bytes(MARK + b'{"a": 1}\n\n' + MARK + b'{"a": 2}\n' + MARK)  # as two files, one behind the other
    assert list(read_lines(file)) == [(1, {"a": 1}), (3, {"a": 2})]
    file.write_bytes(MARK + b"[1]")
    assert read_json(file) == [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"a"', "line 2: not readable as JSON"),
        (b'{"a": 1}\n[1]', "line 2: expected a JSON object, found list"),
        (b'{"a": 1}\n{"a": "\xff"}', r"not UTF-8 text \(line 2\)"),
        (b'{"a": 1}\n{"a": ' + deep(100_000).encode() + b"}", "line 2: not readable as JSON: nested more than"),
        (b'{"a": 1}\n{"a": ' + deep(300).encode() + b"}", "line 2: not readable as JSON: nested more than"),
        (b'{"a": 1}\n{"a": 1' + b"0" * 5000 + b"}", "line 2: not readable as JSON"),
    ],
)
def test_damaged_lines_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(read_lines(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_brackets_are_not_levels() -> None:
    for value in (["[{" * 500], [[1]] * 500, {"a": json.loads(deep(98))}):
        assert parse_json(json.dumps(value), "here") == value


def test_lone_surrogates() -> None:
    assert check_unicode("😀 ü", "here") == "😀 ü"
    with pytest.raises(DataError, match=r"^here: not Unicode text, a lone surrogate: '\\ud800'$"):
        check_unicode("a\ud800b", "here")


@pytest.mark.parametrize("text", ["\ud800", "\\\ud800", 'a"\udfff', "ü😀"])
def test_what_no_utf8_can_hold_is_written_as_json_says_it(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    data = json_bytes({text: [text]})
    data.decode("utf-8")
    write_atomically(file, data + b"\n")
    assert list(read_lines(file)) == [(1, {text: [text]})]
    assert json_bytes(next(read_lines(file))[1]) == data


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_together({one: b"1", two: "2"})
    whole = Path.open

    def full(self: Path, *arguments: object, **named: object) -> object:
        if self.name.startswith("two"):
            raise OSError(28, "No space left on device")
        return whole(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(WriteError, match=rf"^{two}: can't be written: No space left on device$"):
        write_together({one: b"new", two: b"new"})
    monkeypatch.undo()
    assert (one.read_text(), two.read_text()) == ("1", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
