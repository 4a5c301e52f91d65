"""attnpred eval several: one process and one model for benchmarks that otherwise are as by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import evaluate, refused, results, write_texts
from tiny_models import make_tiny_model
from tiny_text_model import save_tiny_text_model

from attention_predictor.errors import FetchError
from attention_predictor.eval.harness import suite as several
from attention_predictor.eval.harness.attached_model import AttachedModel
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.variants import Variant


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, list[Any]]:
    texts, model = write_texts(tmp_path / "texts", sentences=40), save_tiny_text_model(tmp_path / "model")
    common = ["--model", model, "--data", texts, "--context", 400, "--tail", 12, "--budgets", 144]
    return {
        "perplexity": ["perplexity", *common, "--policies", "full,predictor,quest"],
        "map": ["recovery-map", *common, "--interval", 4, "--policies", "predictor,quest"],
    }


@pytest.mark.slow
def test_each_is_as_by_itself_with_one_model(
    parts: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, words in parts.items():
        evaluate(*words, "--out", tmp_path / "alone" / name)
    capsys.readouterr()
    loads: list[str] = []
    load = several.load_model
    monkeypatch.setattr(several, "load_model", lambda name, *more: (loads.append(name), load(name, *more))[1])
    command: list[Any] = []
    for name, words in parts.items():
        command += [*(["then"] if command else []), *words, "--out", tmp_path / "several" / name]
    evaluate("several", *command)
    printed = capsys.readouterr().out
    assert loads == [str(tmp_path / "model")]
    for name in parts:
        alone, among = (RunFolder.finished(tmp_path / place / name) for place in ("alone", "several"))
        assert results(alone) == results(among)
    assert "perplexity: 0.0 minutes, 0.0 so far" in printed
    assert "recovery-map: 0.0 minutes, 0." in printed
    evaluate("several", *command)  # nothing left to do
    assert len(loads) == 1


def test_input_of_all_is_checked_before_the_first_runs(
    parts: dict[str, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, (first, second) = tmp_path / "out", parts.values()
    for changes, line in (
        (["--data", tmp_path / "nowhere"], "nowhere"),
        (["--model", "/nowhere"], "'/nowhere': no such directory"),
        (["--context", 5000], "5000"),
        (["--rule", "predictor,predictor=nowhere"], "nowhere: no such checkpoint"),
    ):
        words = [*first, "--out", out / "first", "then", *second, *changes, "--out", out / "second"]
        said = refused(capsys, monkeypatch, "several", *words)
        assert line in said
        assert f"recovery-map, {out / 'second'}: " in said
        assert not out.exists()


def test_another_model_takes_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, ...]] = []
    monkeypatch.setattr(several, "load_model", lambda *asked: (loads.append(asked), make_tiny_model())[1])
    load = several.LastModel()
    first = load("a", "cpu", "auto")
    assert load("a", "cpu", "auto") is first
    assert load("b", "cpu", "auto") is not first
    assert load("a", "cpu", "auto") is not first
    assert [name for name, *_ in loads] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "expected a benchmark with its options before and behind every 'then'"),
        (["perplexity", "--out", "o", "--data", "d", "then"], "expected a benchmark with its options before and"),
        (["several", "needle"], "argument SUBCOMMAND: invalid choice: 'several'"),
        (["recovery", "--data", "d"], "recovery has no --out: each benchmark needs its own"),
        (["perplexity", "--out", "o", "--data", "d", "--tail", "0"], "--tail 0: expected 1 to below --context 8192"),
        (
            ["perplexity", "--out", "o", "--data", "d", "then", "perplexity", "--out", "./o", "--data", "d"],
            "is given twice: each benchmark needs its own",
        ),
        (
            ["perplexity", "--out", "o/inner", "--data", "d", "then", "perplexity", "--out", "o", "--data", "d"],
            "is inside of another benchmark's, ",
        ),
    ],
)
def test_what_is_refused(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert line in refused(capsys, monkeypatch, "several", *words)


# AttachedModel once


def variant(policy: str = "predictor") -> Variant:
    return Variant.of(Rule(policy, {"policy": policy}), 144)


def test_a_variant_is_attached_once_and_anew_after_a_failure() -> None:
    model, prompt = make_tiny_model(), list(range(3, 90)) * 3
    engines, figures = [], []
    with AttachedModel(model, variant()) as attached:
        for number in range(4):
            try:
                with attached.sample() as engine:
                    assert engine is not None
                    engines.append(engine)
                    EvaluatedModel(model, engine).log_likelihoods(prompt, prompt[:12])
                    figures.append(engine.stats.to_dict() | {"exposed_wait_ms": 0})
                    if number == 1:
                        raise RuntimeError("a sample that fails")
            except RuntimeError:
                assert not engine.attached
        assert engines[0] is engines[1] is not engines[2]
        assert engines[2] is engines[3]
        assert engines[3].attached
    assert not engines[3].attached
    assert figures[0]["steps"] == 11
    assert all(one == figures[0] for one in figures)  # each of its own sample, whatever came before


def test_what_fails_behind_a_sample_ends_with_it() -> None:
    def fail() -> None:
        raise OSError("no such block")

    model = make_tiny_model()
    with AttachedModel(model, variant()) as attached:
        with attached.sample() as first:
            assert first is not None
            first.runtime.stages[0].prefetcher.submit(fail)
        with attached.sample() as second:
            assert second is not None
            assert second is not first
            later = second.runtime.stages[0].prefetcher
            later.wait(later.submit(lambda: None))
            with pytest.raises(FetchError):
                first.runtime.stages[0].prefetcher.submit(lambda: None)


def test_fallbacks_of_attaching_are_told_of_every_sample() -> None:
    model = make_tiny_model("mistral-sliding")
    with AttachedModel(model, variant()) as attached:
        for _ in range(2):
            with attached.sample() as engine:
                assert engine is not None
                assert [*engine.stats.fallbacks.values()] == [1]


def test_the_stock_model_has_no_engine() -> None:
    with AttachedModel(make_tiny_model(), variant("full")) as attached, attached.sample() as engine:
        assert engine is None
