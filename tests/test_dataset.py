"""Recordings on disk: whole or not at all, checked when read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recordings import META, make_record, make_recording

from attention_predictor.errors import DataError
from attention_predictor.train.dataset import HistoryDataset, HistoryWriter
from attention_predictor.train.shards import Record


def test_round_trip(tmp_path: Path) -> None:
    make_recording(tmp_path, 2, first_tokens=1000)
    dataset = HistoryDataset(tmp_path)
    assert dataset.documents == ["books/0: a title?", "books/1: a title?"]
    recording = dataset.load("books/1: a title?")
    expected = make_record(12, first_tokens=1000)
    assert (recording.first_tokens, recording.steps) == (1000, 120)
    assert recording.layers == [0, 1, 0, 1]
    assert recording.heads == [0, 1, 2, 3]
    assert torch.equal(recording.scores_XQN[2], expected.scores_QN.half())
    assert torch.equal(recording.mass_XQN[2], expected.mass_QN.half())


def test_recordings_are_readable_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    make_recording(tmp_path / "recording", 2)
    table = datasets.load_dataset(
        "parquet",
        data_dir=str(tmp_path / "recording" / "shards"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert len(table) == 8
    assert table[5]["document"] == "books/1: a title?"
    assert len(table[5]["scores"]) == 2 * table[5]["steps"] * table[5]["blocks"]


def test_an_interrupted_writer_resumes(tmp_path: Path) -> None:
    def broken() -> Any:
        yield make_record(0)
        raise KeyboardInterrupt

    writer = make_recording(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        writer.write("second", broken())
    resumed = HistoryWriter(tmp_path, META)
    assert resumed.has("books/0: a title?")
    assert not resumed.has("second")
    assert len(list((tmp_path / "shards").iterdir())) == 1
    resumed.write("second", [make_record(1)], split="validation")
    dataset = HistoryDataset(tmp_path)
    assert dataset.documents == ["books/0: a title?", "second"]
    assert [dataset.split(document) for document in dataset.documents] == [None, "validation"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 32), ("sink", 0), ("recent", 32), ("model", "other"), ("max_tokens", 9), ("budgets", "256")],
)
def test_a_writer_does_not_mix_recordings(field: str, value: object, tmp_path: Path) -> None:
    HistoryWriter(tmp_path, META | {field: value})  # holds nothing, and binds nobody
    make_recording(tmp_path, 1)
    with pytest.raises(DataError, match=f"holds a recording with {field}"):
        HistoryWriter(tmp_path, META | {field: value})


@pytest.mark.parametrize("part", [0, 1])
def test_a_lost_or_cut_shard_is_recorded_again(part: int, tmp_path: Path) -> None:
    make_recording(tmp_path, 2)
    one, other = sorted((tmp_path / "shards").iterdir())
    one.unlink()
    other.write_bytes(other.read_bytes()[:-9])
    refuse(tmp_path, "record again to repair it")
    writer = HistoryWriter(tmp_path, META, part=part)
    for document in ("books/0: a title?", "books/1: a title?"):
        assert not writer.has(document)
        writer.write(document, [make_record(3), make_record(4, head=1)])  # of another size than the first time
        assert writer.has(document)
    load_all(tmp_path)


def test_a_place_that_cannot_hold_a_recording(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: can't write a recording here: "):
        HistoryWriter(tmp_path / "file", META)


def test_several_writers_of_one_recording(tmp_path: Path) -> None:
    for part in (0, 1, 2):
        HistoryWriter(tmp_path, META, part=part).write(f"document {part}", [make_record(part)])
    assert HistoryDataset(tmp_path).documents == ["document 0", "document 1", "document 2"]
    resumed = HistoryWriter(tmp_path, META, part=1)  # with other numbers of processes, documents change hands
    assert all(resumed.has(f"document {part}") for part in (0, 1, 2))
    assert not resumed.has("document 3")
    with pytest.raises(DataError, match=r"meta.json: holds a recording with model='made-up', can't add one with 'new'"):
        HistoryWriter(tmp_path, META | {"model": "new"}, part=3)


def test_a_writer_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="meta of a recording lacks sink, model"):
        HistoryWriter(tmp_path, {"block_size": 16, "recent": 64})
    writer, good = HistoryWriter(tmp_path, META), make_record(0)
    for wrong in (
        Record(0, 0, 0, 1100, good.scores_QN, good.mass_QN[:-1]),
        Record(0, 0, 0, 1300, good.scores_QN, good.mass_QN),
        Record(0, 0, 0, 1100, good.scores_QN * torch.nan, good.mass_QN),
    ):
        with pytest.raises(DataError, match="document 'a', sequence 0, layer 0, head 0"):
            writer.write("a", [wrong])
    with pytest.raises(DataError, match="no records"):
        writer.write("a", [])
    assert not writer.has("a")
    assert not list((tmp_path / "shards").iterdir())


def damage_meta(directory: Path, **changes: object) -> None:
    path = directory / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


META_DAMAGE = {
    "block size": ({"block_size": 32}, "block_size is 32, expected 16"),
    "newer": ({"format_version": 99}, "format_version is 99, this release reads 3"),
    "empty": ({"documents": {}}, "no documents"),
    "foreign": ({"documents": ["a"]}, "lacks shard entries"),
}


@pytest.mark.parametrize("damage", META_DAMAGE)
def test_meta_refusals(damage: str, tmp_path: Path) -> None:
    changes, message = META_DAMAGE[damage]
    make_recording(tmp_path, 2)
    damage_meta(tmp_path, **changes)
    refuse(tmp_path, rf"meta.json: .*{message}")


def test_file_refusals(tmp_path: Path) -> None:
    refuse(tmp_path, "meta.json: file is missing")
    make_recording(tmp_path, 2)
    shard = sorted((tmp_path / "shards").iterdir())[0]
    whole, meta = shard.read_bytes(), (tmp_path / "meta.json").read_text()
    for text, message in (
        ("{", "not readable as JSON"),
        ("[]", "format_version is"),
        ('{"format_version": 3}', "lacks"),
    ):
        (tmp_path / "meta.json").write_text(text)
        refuse(tmp_path, rf"meta.json: .*{message}")
    (tmp_path / "meta.json").write_text(meta)
    shard.write_bytes(whole[:-9])
    refuse(tmp_path, f"{shard.name}: shard has {len(whole) - 9} bytes, expected {len(whole)}")
    shard.write_bytes(bytes(len(whole)))
    refuse(tmp_path, f"{shard.name}: not readable as parquet")
    shard.unlink()
    refuse(tmp_path, f"{shard.name}: shard is missing")


NUMBERS = {
    "nan": (lambda row: {"mass": b"\xff\x7f" * (len(row["mass"]) // 2)}, "mass hold NaN or infinity"),
    "range": (lambda row: {"scores": b"\x00\x40" * (len(row["scores"]) // 2)}, "scores reach from 2 to 2"),
    "short": (lambda row: {"mass": row["mass"][:-2]}, "mass have .* bytes"),
    "blocks": (lambda row: {"blocks": row["blocks"] + 1}, "do not make 78 blocks"),
    "mixed": (lambda row: {"steps": row["steps"] + row["head"]}, "records differ"),
}


@pytest.mark.parametrize("damage", NUMBERS)
def test_number_refusals(damage: str, tmp_path: Path) -> None:
    from pyarrow import parquet

    change, message = NUMBERS[damage]
    make_recording(tmp_path, 1)
    shard = next((tmp_path / "shards").iterdir())
    table = parquet.read_table(shard)
    rows = [row | change(row) for row in table.to_pylist()]
    parquet.write_table(table.from_pylist(rows, schema=table.schema), shard)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["documents"]["books/0: a title?"]["bytes"] = shard.stat().st_size
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    refuse(tmp_path, f"{shard.name}: .*{message}")


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_recording(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuse(tmp_path, r"pip install 'attention-predictor\[train\]'")


def load_all(directory: Path) -> None:
    dataset = HistoryDataset(directory)
    for document in dataset.documents:
        dataset.load(document)


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_all(directory)
    assert "\n" not in str(caught.value)
