"""Training on recordings learns, continues, stops, refuses."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recordings import META, make_record, make_recording

from attention_predictor.cli import main as run_cli
from attention_predictor.errors import CheckpointError, ConfigError, DataError
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train import fit as fit_module
from attention_predictor.train.dataset import HistoryDataset, HistoryWriter
from attention_predictor.train.fit import add_arguments, fit, main, train_step
from attention_predictor.train.mixture import Mixture, averaged
from attention_predictor.train.objective import document_loss
from attention_predictor.train.options import TrainOptions
from attention_predictor.train.shards import Record
from attention_predictor.train.state import STATE_FILE
from attention_predictor.train.validate import BUDGETS, validate
from attention_predictor.writing import locked


def split_of(directory: Path, val_fraction: float, seed: int) -> list[list[str]]:
    """Names of the training and held-out documents of one recording."""
    return [[place.document for place in part] for (part,) in Mixture([directory]).split(val_fraction, seed)]


@pytest.mark.slow
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
    _, held_out = split_of(tmp_path / "data", 0.1, 0)
    again = validate(loaded, [dataset.load(d) for d in held_out], dataset.meta, torch.device("cpu"))
    assert again["relative_recovery"] == pytest.approx(found[arch])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {arch} | {found[arch]['256']:.4f} |" in card
    assert f"--out {tmp_path / 'out'}" in card
    assert "--horizon 1 --steps 60 --batch 8 --lr 0.01 --log-every 30\n" in card
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / STATE_FILE).exists()


@pytest.mark.slow
def test_training_is_reproducible_and_leaves_the_global_seed_alone(tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 2)
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        runs.append(fit(tmp_path / "data", tmp_path / "out", TrainOptions(steps=3, batch=4, seed=5)))
        shutil.rmtree(tmp_path / "out")
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
    training, held_out = split_of(tmp_path, 0.5, 0)
    assert held_out == ["judge"]
    assert len(training) == 2


def test_documents_of_one_group_are_held_out_together(tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 9, files=3)
    dataset = HistoryDataset(tmp_path / "data")
    for seed in range(5):
        training, held_out = split_of(tmp_path / "data", 0.1, seed)
        assert (len(training), len(held_out)) == (6, 3)
        assert not {dataset.group(one) for one in training} & {dataset.group(one) for one in held_out}
    make_recording(tmp_path / "one", 4, files=1)
    with pytest.raises(DataError, match="no document is left to train on; record at least 2 texts"):
        fit(tmp_path / "one", tmp_path / "out")


class TestSeveralRecordings:
    """Of models that differ in layers, heads and lengths."""

    def test_a_text_is_held_out_of_all_or_of_none(self, tmp_path: Path) -> None:
        """Recordings have some texts in common, in another order and number; one has a split of its own."""
        for name, documents in (("a", range(9)), ("b", [12, 3, 7, 2, 10, 5]), ("c", [1, 3, 20])):
            writer = HistoryWriter(tmp_path / name, META)
            for one in documents:
                split = "validation" if (name, one) == ("c", 1) else None
                writer.write(f"{name} of {one}", [make_record(one)], group=f"text {one}", split=split)
        mixture = Mixture([tmp_path / name for name in "abc"])
        for seed in range(10):
            groups = [
                {mixture.recordings[place.recording].group(place.document) for places in part for place in places}
                for part in mixture.split(0.2, seed)
            ]
            assert not groups[0] & groups[1]
            assert "text 1" in groups[1]
            assert all(places for part in mixture.split(0.2, seed) for places in part[:2])
        assert len({str(mixture.split(0.2, seed)) for seed in range(10)}) > 1

    def test_one_that_cannot_be_judged_is_refused(self, tmp_path: Path) -> None:
        """Though the other can, before any training."""
        make_recording(tmp_path / "long", 2)
        writer = HistoryWriter(tmp_path / "short", META)
        for name in "ab":
            writer.write(name, [Record(0, 0, 0, 100, torch.rand(4, 7), torch.rand(4, 7))])
        with pytest.raises(DataError, match=r"/short: its held-out documents have at most 103 tokens; .* than 256"):
            fit([tmp_path / "long", tmp_path / "short"], tmp_path / "out")

    @pytest.mark.parametrize(("tokens", "kept"), [(300, 1), (600, 2)])
    def test_a_budget_that_one_is_too_short_for_is_named_once(self, tmp_path, caplog, tokens: int, kept: int) -> None:
        make_recording(tmp_path / "long", 2)
        writer = HistoryWriter(tmp_path / "short", META)
        blocks = -(-(tokens + 3) // META["block_size"])
        for name in "ab":
            writer.write(name, [Record(0, 0, 0, tokens, torch.rand(4, blocks), torch.rand(4, blocks))])
        options = TrainOptions(steps=2, batch=2, log_every=1)
        validation = fit([tmp_path / "long", tmp_path / "short"], tmp_path / "out", options)["validation"]
        assert list(validation["ema"]["recovery"]) == list(map(str, BUDGETS[:kept]))
        lines = [one.getMessage() for one in caplog.records if one.name.endswith("train.fit")]
        assert lines == [
            f"{tmp_path / 'short'}: no held-out document is long enough to judge a budget of {budget} tokens: "
            "means leave that budget out"
            for budget in BUDGETS[kept:]
        ]

    def test_figures_are_averaged_over_those_that_all_have(self) -> None:
        names = ("mse", "recovery", "relative_recovery", "relative_recovery_ahead", "overlap")
        every = [{name: {"256": 0.5, "512": 0.7} for name in names}, {name: {"256": 0.7} for name in names}]
        assert averaged(every)["recovery"] == {"256": pytest.approx(0.6)}

    @pytest.fixture
    def two(self, tmp_path: Path) -> list[Path]:
        make_recording(tmp_path / "one", 8)
        other = HistoryWriter(tmp_path / "two", META | {"model": "another", "max_tokens": 9})
        for number in range(2):
            records = [make_record(number + layer, layer=layer, steps=90, first_tokens=700) for layer in range(7)]
            other.write(f"books/{number}: a title?", records)  # documents of the same names
        return [tmp_path / "one", tmp_path / "two"]

    def test_take_turns_and_count_equally(self, two, tmp_path, monkeypatch):
        layers: list[int] = []

        def seen(predictor: Any, network: Any, recording: Any, *rest: Any) -> Any:
            layers.append(max(recording.layers))
            return document_loss(predictor, network, recording, *rest)

        monkeypatch.setattr(fit_module, "document_loss", seen)
        metrics = fit(two, tmp_path / "out", TrainOptions(steps=4, batch=1))
        assert layers == [6, 1, 6, 1]
        facts = AttentionPredictor.from_pretrained(tmp_path / "out").training_facts
        assert facts["recorded_from"] == "made-up, another"
        assert (facts["documents"], facts["held_out_documents"]) == (8, 2)
        options = TrainOptions(steps=1, batch=1)
        alone = [fit(one, tmp_path / f"alone-{n}", options)["validation"]["ema"] for n, one in enumerate(two)]
        found = metrics["validation"]["ema"]["relative_recovery"]
        for budget, value in found.items():
            parts = [one["relative_recovery"][budget] for one in alone if budget in one["relative_recovery"]]
            assert value == pytest.approx(sum(parts) / len(parts))
        assert f"attnpred train --data {two[0]} --data {two[1]} --out" in (tmp_path / "out" / "README.md").read_text()

    def test_that_disagree(self, two, tmp_path):
        HistoryWriter(tmp_path / "three", META | {"rows": "sparse"}).write("a", [make_record(0)])
        message = r"three/meta\.json: rows is 'sparse', in .*one/meta\.json it is 'full'; recordings must agree in it"
        with pytest.raises(DataError, match=message):
            fit([*two, tmp_path / "three"], tmp_path / "out")
        with pytest.raises(DataError, match="one: recording is given twice"):
            fit([*two, two[0]], tmp_path / "out")
        with pytest.raises(DataError, match="no recording to train on"):
            fit([], tmp_path / "out")


def test_a_damaged_document_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_recording(tmp_path / "data", 3)
    writer.write("judge", [make_record(77)], split="validation")

    def damaged(record: Record) -> Record:
        return replace(record, mass_QN=record.mass_QN.index_fill(0, torch.tensor([5]), torch.nan))

    monkeypatch.setattr(torch, "isfinite", lambda values: torch.ones(()).bool())  # or the writer would refuse it
    writer.write("books/2: a title?", [damaged(make_record(20))])
    monkeypatch.undo()
    monkeypatch.setattr(fit_module, "train_step", None)
    monkeypatch.setattr(fit_module, "validate", None)
    with pytest.raises(DataError, match=r"books-2-a-title-.*parquet: mass hold NaN or infinity"):
        fit(tmp_path / "data", tmp_path / "out", TrainOptions(steps=2))


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
    monkeypatch.undo()
    options = TrainOptions(steps=4, batch=1, log_every=2)
    with pytest.raises(ConfigError, match="steps was 50, is 4"):
        fit(tmp_path / "data", tmp_path / "out", options, resume=True)


def test_interrupted_before_its_first_validation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args):
        raise KeyboardInterrupt

    make_recording(tmp_path / "data", 2)
    options = TrainOptions(steps=4, batch=1, log_every=2)
    monkeypatch.setattr(fit_module, "document_loss", interrupted)
    assert fit(tmp_path / "data", tmp_path / "out", options)["interrupted"]
    monkeypatch.undo()
    state = tmp_path / "out" / STATE_FILE
    state.rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"of an interrupted run without training-state\.pt: delete it"):
        fit(tmp_path / "data", tmp_path / "out", options, resume=True)
    (tmp_path / "kept").rename(state)
    resumed = fit(tmp_path / "data", tmp_path / "out", options, resume=True)
    assert resumed == fit(tmp_path / "data", tmp_path / "whole", options)


def test_directories_that_training_leaves_alone(tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 2)
    out = tmp_path / "out"
    out.mkdir()
    with locked(out), pytest.raises(ConfigError, match="another run is writing to it"):
        fit(tmp_path / "data", out, TrainOptions(steps=2, batch=1))
    (out / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"training would replace README\.md here; choose another directory"):
        fit(tmp_path / "data", out, TrainOptions(steps=2, batch=1))
    assert (out / "README.md").read_text() == "mine"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    make_recording(tmp_path / "data", 2)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    given = ["--data", data, "--out", out, "--steps", "2", "--batch", "2"]
    assert main(parser.parse_args([*given, "--json"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 2
    assert AttentionPredictor.from_pretrained(printed["out"]).training_facts["options"]["batch"] == 2
    with pytest.raises(ConfigError, match="a predictor is here already"):
        main(parser.parse_args(given))
    with pytest.raises(ConfigError, match=r"trained with other options \(steps was 2, is 3\)"):
        main(parser.parse_args([*given[:-4], "--steps", "3", "--batch", "2", "--resume"]))
    make_recording(tmp_path / "other", 3)
    with pytest.raises(ConfigError, match=r"trained with other options \(recording was '"):
        main(parser.parse_args(["--data", str(tmp_path / "other"), *given[2:], "--resume"]))
    before = (tmp_path / "out" / "model.safetensors").stat()
    assert main(parser.parse_args([*given, "--json", "--resume"])) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert "trained with these options is here already: it is kept" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").stat() == before
    shutil.rmtree(out)
    assert main(parser.parse_args(given)) == 0
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said[:-1])) < 100
    relative = printed["validation"]["time-filters"]["relative_recovery"]
    assert said[1].split() == ["budget", *relative]
    assert [line.split()[0] for line in said[2:-1]] == list(printed["validation"])
    (row,) = (line.split()[1:] for line in said if line.startswith("time-filters"))
    assert row == [f"{100 * value:.2f}" for value in relative.values()]
    assert said[-1] == f"after 2 of 2 steps; saved to {out}"


REFUSED = {
    "arch": ({"arch": "ema"}, "arch='ema' is not allowed: expected one of paper, time-filters"),
    "loss": ({"loss": "l1"}, "loss='l1'"),
    "steps": ({"steps": 0}, "steps=0 is not allowed: expected at least 1"),
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recording in `data` and the state of an interrupted run in `out`."""
    directory = tmp_path_factory.mktemp("unfinished")
    make_recording(directory / "data", 3)
    with pytest.MonkeyPatch.context() as patch:
        steps = iter([train_step])
        patch.setattr(fit_module, "train_step", lambda *args: next(steps, interrupt)(*args))
        assert fit(directory / "data", directory / "out", SHORT)["interrupted"]
    return directory


SHORT = TrainOptions(steps=3, batch=2, log_every=1)
STATES: dict[str, tuple[Any, str]] = {
    "damaged": (lambda state: b"damaged", r"training-state.pt: not a training state \("),
    "foreign": (lambda state: [1, 2], "format_version is None, this release reads 1"),
    "older": (lambda state: without(state, "format_version"), "format_version is None, this release reads 1"),
    "newer": (lambda state: state | {"format_version": 2}, "format_version is 2, this release reads 1"),
    "lacking": (lambda state: without(state, "curve"), "not a training state, lacks curve"),
    "predictor": (lambda state: state | {"predictor": {}}, "training-state.pt: of another predictor"),
    "best": (lambda state: state | {"best": 3}, "training-state.pt: of another predictor"),
    "optimizer": (lambda state: state | {"optimizer": {}}, "training-state.pt: of another predictor"),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_of_another_kind_is_refused(damage: str, unfinished: Path, tmp_path: Path) -> None:
    change, message = STATES[damage]
    changed = change(torch.load(unfinished / "out" / STATE_FILE, weights_only=True))
    if isinstance(changed, bytes):
        (tmp_path / STATE_FILE).write_bytes(changed)
    else:
        torch.save(changed, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match=message) as caught:
        fit(unfinished / "data", tmp_path, SHORT, resume=True)
    assert "\n" not in str(caught.value)


def test_a_run_is_not_continued_on_another_recording(unfinished: Path, tmp_path: Path) -> None:
    make_recording(tmp_path / "data", 2)
    HistoryWriter(tmp_path / "data", META).write("another", [make_record(5)])
    with pytest.raises(ConfigError, match=r"other options \(recording was '\w{16}', is '\w{16}'\)"):
        fit(tmp_path / "data", unfinished / "out", SHORT, resume=True)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != name}


def interrupt(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.slow
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
    with pytest.raises(
        DataError, match=r"its held-out documents have at most \d+ tokens; judging a predictor needs more than 256"
    ):
        fit(tmp_path / "short", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be made"):
        fit(tmp_path / "short", tmp_path / "file" / "out")


@pytest.mark.parametrize("empty", ["--data", "--out"])
def test_an_empty_name_is_refused(empty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--data": str(tmp_path), "--out": str(tmp_path)} | {empty: ""}
    assert run_cli(["train", *(text for pair in given.items() for text in pair)]) == 2
    assert capsys.readouterr().err == f"attnpred train: {empty} '': expected the name of a directory\n"
