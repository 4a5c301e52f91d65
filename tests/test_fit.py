"""Recordings on disk, and that training on them learns."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_predictor.predictor.errors import CheckpointError, ConfigError, DataError
from attention_predictor.predictor.model import AttentionPredictor, architecture
from attention_predictor.train import fit as fit_module
from attention_predictor.train.dataset import HistoryDataset, HistoryWriter
from attention_predictor.train.fit import add_arguments, fit, main
from attention_predictor.train.objective import document_loss
from attention_predictor.train.options import TrainOptions
from attention_predictor.train.shards import Record
from attention_predictor.train.state import STATE_FILE
from attention_predictor.train.validate import candidates, spread, validate

META = {"block_size": 16, "sink": 64, "recent": 64, "model": "made-up", "rows": "full"}


def make_record(seed: int, *, layer: int = 0, head: int = 0, steps: int = 120, first_tokens: int = 1100) -> Record:
    """Attention that sweeps over the document, a block every 4 steps, under noise: its next place is learnable."""
    generator = torch.Generator().manual_seed(seed)
    n_blocks = -(-(first_tokens + steps - 1) // 16)
    step_Q1, block_N = torch.arange(steps)[:, None], torch.arange(n_blocks)
    start = int(torch.randint(8, n_blocks - 8 - steps // 4, (1,), generator=generator))
    centre_Q1 = start + (step_Q1 + 3) // 4
    logits_QN = 6.0 * (block_N == centre_Q1) + 0.8 * torch.randn(steps, n_blocks, generator=generator)
    entered_QN = block_N < -(-(first_tokens + step_Q1) // 16)
    mass_QN = logits_QN.masked_fill(~entered_QN, -torch.inf).softmax(-1)
    return Record(0, layer, head, first_tokens, mass_QN / 4, mass_QN)


def make_recording(directory: Path, documents: int = 6, **shape: int) -> HistoryWriter:
    writer = HistoryWriter(directory, META)
    for i in range(documents):
        records = (make_record(10 * i + head, head=head, layer=head % 2, **shape) for head in range(4))
        writer.write(f"books/{i}: a title?", records)
    return writer


# Recordings


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


@pytest.mark.parametrize(("field", "value"), [("block_size", 32), ("sink", 0), ("recent", 32), ("model", "other")])
def test_a_writer_does_not_mix_recordings(field: str, value: object, tmp_path: Path) -> None:
    make_recording(tmp_path, 1)
    with pytest.raises(DataError, match=f"holds a recording with {field}"):
        HistoryWriter(tmp_path, META | {field: value})


def test_several_writers_of_one_recording(tmp_path: Path) -> None:
    for part in (0, 1, 2):
        HistoryWriter(tmp_path, META, part=part).write(f"document {part}", [make_record(part)])
    assert HistoryDataset(tmp_path).documents == ["document 0", "document 1", "document 2"]
    resumed = HistoryWriter(tmp_path, META, part=1)  # with other numbers of processes, documents change hands
    assert all(resumed.has(f"document {part}") for part in (0, 1, 2))
    assert not resumed.has("document 3")
    with pytest.raises(DataError, match=r"meta.json: holds a recording with model 'made-up', can't add one with 'new'"):
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


# What training is judged by


def test_candidates_are_neither_sink_nor_recent() -> None:
    assert candidates(1600, META) == (4, 96)
    assert candidates(1601, META) == (4, 96)
    assert candidates(1616, META) == (4, 97)
    assert candidates(100, META) == (4, 2)


def test_recovery_of_perfect_foresight_is_one(tmp_path: Path) -> None:
    class Foresight(type(architecture("last")())):  # type: ignore[misc]
        def unroll(self, rows_BGRN: torch.Tensor, steps_S: torch.Tensor) -> torch.Tensor:
            return rows_BGRN[:, :, steps_S + 1, :, None]

    make_recording(tmp_path, 1)
    recordings = [HistoryDataset(tmp_path).load("books/0: a title?")]
    by_rule = {
        name: validate(predictor, recordings, META, torch.device("cpu"))
        for name, predictor in (("foresight", Foresight()), ("mean", architecture("mean")()))
    }
    for metric in ("relative_recovery", "relative_recovery_ahead", "overlap"):
        assert by_rule["foresight"][metric] == {budget: pytest.approx(1.0) for budget in ("256", "512", "1024")}
        assert by_rule["mean"][metric]["256"] < 0.99
    assert by_rule["foresight"]["mse"]["share"] < 1e-9 < by_rule["mean"]["mse"]["share"]
    assert by_rule["foresight"]["recovery"]["256"] <= by_rule["foresight"]["recovery"]["1024"] <= 1.001


def test_spread() -> None:
    assert spread(0, 3, 10) == [0, 1, 2]
    assert spread(5, 101, 3) == [5, 52, 100]
    assert spread(-1, 1, 3) == [0]


# Training


@pytest.mark.parametrize("arch", ["time-filters", "paper"])
def test_training_beats_the_last_row(arch: str, tmp_path: Path) -> None:
    make_recording(tmp_path / "data")
    options = TrainOptions(arch=arch, horizon=1, steps=60, batch=8, lr=1e-2, log_every=30)
    metrics = fit(tmp_path / "data", tmp_path / "out", options)
    assert set(metrics["validation"]) == {arch, "last", "ema", "mean"}
    found = {name: values["relative_recovery"] for name, values in metrics["validation"].items()}
    # Where a sweep goes next only a convolution over blocks can know: neither rule looks at a block's neighbours.
    for budget in ("256", "512"):
        assert found[arch][budget] > max(found[rule][budget] for rule in ("last", "ema", "mean"))
    loaded = AttentionPredictor.from_pretrained(tmp_path / "out")
    assert loaded.arch == arch
    assert loaded.training_facts["metrics"] == metrics
    dataset = HistoryDataset(tmp_path / "data")
    _, held_out = fit_module.split_documents(dataset, 0.1, 0)
    again = validate(loaded, [dataset.load(d) for d in held_out], dataset.meta, torch.device("cpu"))
    assert again["relative_recovery"] == pytest.approx(found[arch])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {arch} | {found[arch]['256']:.4f} |" in card
    assert f"--out {tmp_path / 'out'}" in card
    assert "--horizon 1 --steps 60 --batch 8 --lr 0.01 --log-every 30\n" in card
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / STATE_FILE).exists()


def test_training_is_reproducible_and_leaves_the_global_seed_alone(tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 2)
    before = torch.get_rng_state()
    runs = [fit(tmp_path / "data", tmp_path / "out", TrainOptions(steps=3, batch=4, seed=5)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_mse_loss_and_bf16_run(tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 2)
    options = TrainOptions(arch="paper", loss="mse", steps=2, batch=2, precision="bf16")
    metrics = fit(tmp_path / "data", tmp_path / "out", options)
    assert metrics["steps"] == 2


def test_a_requested_split_is_kept(tmp_path: Path) -> None:
    writer = make_recording(tmp_path, 2)
    writer.write("judge", [make_record(77)], split="validation")
    training, held_out = fit_module.split_documents(HistoryDataset(tmp_path), 0.5, 0)
    assert held_out == ["judge"]
    assert len(training) == 2


@pytest.mark.parametrize("after", [0, 7])
def test_an_interrupt_saves_the_best_so_far(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return document_loss(*args)

    make_recording(tmp_path / "data", 2)
    monkeypatch.setattr(fit_module, "document_loss", interrupted)
    metrics = fit(tmp_path / "data", tmp_path / "out", TrainOptions(steps=50, batch=1, log_every=2))
    assert metrics["interrupted"]
    assert metrics["steps"] == after
    assert "time-filters" in metrics["validation"]
    assert AttentionPredictor.from_pretrained(tmp_path / "out").training_facts["metrics"] == metrics


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_recording(tmp_path / "data", 2)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    assert main(parser.parse_args(["--data", data, "--out", out, "--steps", "2", "--batch", "2"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 2
    assert AttentionPredictor.from_pretrained(printed["out"]).training_facts["options"]["batch"] == 2


REFUSED = {
    "arch": ({"arch": "ema"}, "arch='ema' can't be trained; choose from paper, time-filters"),
    "loss": ({"loss": "l1"}, "loss='l1'"),
    "steps": ({"steps": 0}, "steps=0 must be at least 1"),
    "batch": ({"batch": -1}, "batch=-1"),
    "lr": ({"lr": float("nan")}, "lr=nan"),
    "val_fraction": ({"val_fraction": 1.0}, "val_fraction=1.0"),
    "precision": ({"precision": "fp8"}, "precision='fp8'"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_option_refusals(option: str, tmp_path: Path) -> None:
    changes, message = REFUSED[option]
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**changes)


def test_refusals_before_any_work(tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 2)
    for message, changes in (
        ("device='tpu9' can't be used", {"device": "tpu9"}),
        ("tracker='paper' is not one of none, tensorboard, wandb", {"tracker": "paper"}),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(tmp_path / "data", tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_continued_run_ends_as_one_that_was_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_recording(tmp_path / "data", 4)
    options = TrainOptions(steps=12, batch=4, log_every=3)
    whole = fit(tmp_path / "data", tmp_path / "whole", options)

    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 7 * 4:  # in the eighth step, four documents each: after the sixth the state was saved
            raise KeyboardInterrupt
        return document_loss(*args)

    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "document_loss", interrupted)
        assert fit(tmp_path / "data", out, options)["interrupted"]
    with pytest.raises(ConfigError, match="an unfinished run is here; continue it with --resume"):
        fit(tmp_path / "data", out, options)
    with pytest.raises(ConfigError, match=r"other options \(steps was 12, is 13\)"):
        fit(tmp_path / "data", out, TrainOptions(steps=13, batch=4, log_every=3), resume=True)
    assert fit(tmp_path / "data", out, options, resume=True) == whole
    mine, other = (AttentionPredictor.from_pretrained(path).state_dict() for path in (out, tmp_path / "whole"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    (out / STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a training state"):
        fit(tmp_path / "data", out, options, resume=True)


def test_wandb_without_a_key_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    make_recording(tmp_path / "data", 2)
    fit(tmp_path / "data", tmp_path / "out", TrainOptions(steps=2, batch=2, log_every=1), tracker="wandb")
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


def test_data_that_cannot_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta\.json"):
        fit(tmp_path / "nowhere", tmp_path / "out")
    make_recording(tmp_path / "one", 1)
    with pytest.raises(DataError, match="no document is left to train on"):
        fit(tmp_path / "one", tmp_path / "out")
    writer = HistoryWriter(tmp_path / "short", META)
    for name in "ab":
        writer.write(name, [Record(0, 0, 0, 100, torch.rand(4, 7), torch.rand(4, 7))])
    with pytest.raises(DataError, match="too short to judge"):
        fit(tmp_path / "short", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be made"):
        fit(tmp_path / "short", tmp_path / "file" / "out")
