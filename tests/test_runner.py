"""The runner: what is done stays done, what failed is told, and nothing of one run gets into another."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model
from tiny_text_model import make_tiny_tokenizer, save_tiny_text_model, write_longbench
from transformers import DynamicCache

from attention_predictor import progress as progress_module
from attention_predictor.cli import main
from attention_predictor.commands.run_options import add_run_arguments
from attention_predictor.errors import ConfigError, ContextLengthError, DataError
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness import runner as runner_module
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.predictions import Appender, cut_torn_line, fold, gather, part, read_lines
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.prompts import prompt_ids
from attention_predictor.eval.harness.provenance import git_state
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Benchmark, Plan, Sample, describe, run
from attention_predictor.eval.harness.variants import make_variants
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.predictor.model import AttentionPredictor

ONE_THREAD = dict(os.environ) | {
    "OMP_NUM_THREADS": "1"
}  # for processes of their own, as ``conftest`` does for this one
VARYING = ("seconds", "exposed_wait_ms")


class Toy(Benchmark):
    """Continues a line; ``failing`` maps (task, id) to what is raised once."""

    name = "toy"

    def __init__(self, tasks=("a", "b"), samples=4, words="Once upon a time ", failing=None, options=None):
        self.tasks, self.count, self.words = tasks, samples, words
        self.failing, self.options = dict(failing or {}), dict(options or {})
        self.tokenizer, self.asked = make_tiny_tokenizer(), []

    def settings(self):
        return {"words": self.words}

    def samples(self, task):
        for number in range(self.count):
            yield Sample(f"id{number}", f"{task}{number}: " + self.words * 15, {"answers": [str(number)]})

    def predict(self, evaluated, task, sample):
        self.asked.append((task, sample.id))
        if error := self.failing.pop((task, sample.id), None):
            raise error
        ids = prompt_ids(self.tokenizer, sample.prompt, chat=False)
        tokens = evaluated.generate(ids, 5, **self.options)
        return {"pred": self.tokenizer.decode(tokens), "tokens": tokens}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """``plan(option, …)``: from the command line's options; the model is a tiny one."""
    monkeypatch.setattr(runner_module, "load_model", lambda *_: make_tiny_model())

    def make(*options: object) -> Plan:
        parser = argparse.ArgumentParser()
        add_run_arguments(parser)
        given = ["--model", "tiny", "--out", tmp_path / "out", "--device", "cpu", "--budgets", 144, *options]
        return Plan.of(parser.parse_args([str(one) for one in given]))

    return make


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is refused must be refused before this."""

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runner_module, "load_model", load)


def results(folder: RunFolder) -> dict:
    """All records, without what differs between runs."""
    return {
        (variant, task): [{k: v for k, v in one.items() if k not in VARYING} for one in folder.records(variant, task)]
        for variant in folder.variants
        for task in folder.tasks
    }


def begin(benchmark: Benchmark, plan: Plan) -> None:
    """A run that was stopped before its first sample."""
    with RunFolder(plan.out).opened(describe(benchmark, plan), {}):
        pass


class TestRun:
    def test_what_is_written(self, plan):
        folder = run(Toy(), plan("--policies", "full,streaming,predictor"))
        assert folder.tasks == ("a", "b")
        assert folder.variants == ("full", "streaming-144", "predictor-144")
        path = folder.results("predictor-144", "b")
        assert path == folder.path / "predictor-144" / "b.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(one["id"], one["index"], one["answers"]) for one in lines] == [
            (f"id{n}", n, [str(n)]) for n in range(4)
        ]
        for one in lines:
            assert len(one["tokens"]) == 5
            assert one["seconds"] > 0
            assert 0 < one["hit_rate"] <= 1
            assert one["fetched_bytes"] > 0
            assert one["steps"] == 4  # the first token comes from the prefill
        (stock, *_) = folder.records("full", "a")
        assert "hit_rate" not in stock
        assert sorted(one.name for one in folder.path.iterdir()) == [
            ".lock",
            "full",
            "predictor-144",
            "run.json",
            "streaming-144",
        ]

    def test_run_json(self, plan):
        folder = run(Toy(), plan("--limit", 2, "--seed", 7))
        saved = json.loads((folder.path / "run.json").read_text())
        assert saved["benchmark"] == "toy"
        expected = {"model": "tiny", "device": "cpu", "dtype": "auto", "seed": 7, "words": Toy().words}
        assert saved["settings"] == expected
        assert saved["tasks"]["a"]["samples"] == 2
        assert saved["variants"]["full"] == {"policy": "full", "budget": None, "stock": True}
        assert saved["variants"]["predictor-144"]["late_fetch"] == 0.25
        (session,) = saved["sessions"]
        assert session["versions"]["torch"] == torch.__version__
        assert {"python", "transformers", "attention-predictor"} <= set(session["versions"])
        assert session["processes"] == 1
        assert session["machine"]["cpus"] == os.cpu_count()
        run(Toy(), plan("--limit", 2, "--seed", 7))
        assert len(RunFolder(folder.path).sessions) == 2

    def test_full_is_the_stock_model_unless_settings_say_otherwise(self, plan):
        folder = run(
            Toy(), plan("--policies", "full", "--rule", "offloaded: full,prefetch=none", "--budgets", "144,160")
        )
        assert folder.variants == ("full", "offloaded")
        stock, offloaded = (folder.records(name, "a") for name in folder.variants)
        assert [one["pred"] for one in stock] == [one["pred"] for one in offloaded]
        assert all("streamed_bytes" not in one for one in stock)
        assert all(one["streamed_bytes"] > 0 for one in offloaded)

    def test_a_budget_of_the_whole_context_gives_what_the_stock_model_gives(self, plan):
        folder = run(Toy(tasks=("a",), samples=2), plan("--policies", "full,predictor", "--budgets", "144,4096"))
        preds = {name: [one["pred"] for one in folder.records(name, "a")] for name in folder.variants}
        assert preds["predictor-4096"] == preds["full"] != preds["predictor-144"]

    @pytest.mark.slow
    def test_goes_on_where_it_was_stopped(self, plan, interruptible):
        expected = results(run(Toy(), plan("--out", plan().out.with_name("undisturbed"))))
        with pytest.raises(KeyboardInterrupt):
            run(Toy(failing={("b", "id2"): KeyboardInterrupt()}), plan())
        assert len(RunFolder(plan().out).records("full", "b")) == 2
        again = Toy()
        assert results(run(again, plan())) == expected
        assert again.asked[:2] == [("b", "id2"), ("b", "id3")]
        idle = Toy()
        assert results(run(idle, plan())) == expected
        assert idle.asked == []

    def test_nothing_to_do_needs_no_model(self, plan, monkeypatch):
        run(Toy(samples=1), plan())
        monkeypatch.setattr(runner_module, "load_model", None)
        run(Toy(samples=1), plan())

    @pytest.mark.parametrize(
        "error", [RuntimeError("no such thing"), torch.OutOfMemoryError("out of memory\nby 2 GiB"), MemoryError()]
    )
    def test_a_sample_that_fails_is_recorded_and_tried_again_on_request(self, plan, error):
        folder = run(Toy(failing={("a", "id1"): error}), plan("--policies", "full"))
        records = folder.records("full", "a")
        assert [one["id"] for one in records] == ["id0", "id1", "id2", "id3"]
        failed = records[1]
        assert failed["error"].startswith(f"{type(error).__name__}: ")
        assert "\n" not in failed["error"]
        assert failed["pred"] == ""
        assert failed["answers"] == ["1"]
        assert not any("error" in one for one in records if one is not failed)
        idle, again = Toy(), Toy()
        run(idle, plan("--policies", "full"))
        assert idle.asked == []
        folder = run(again, plan("--policies", "full", "--retry-errors"))
        assert again.asked == [("a", "id1")]
        lines = [one for _, one in read_lines(folder.results("full", "a"))]
        assert [one["index"] for one in lines] == [0, 1, 2, 3]  # one line a sample, not the old one beside the new
        assert not any("error" in one for one in lines)

    def test_a_prompt_too_long_is_an_error_of_its_sample(self, plan):
        folder = run(Toy(words="word " * 100, tasks=("a",), samples=1), plan())
        for name in folder.variants:
            (record,) = folder.records(name, "a")
            assert record["error"].startswith("ContextLengthError: a context of")

    def test_a_lost_device_ends_the_run(self, plan):
        failing = {("a", "id1"): torch.AcceleratorError("CUDA error: an illegal memory access")}
        with pytest.raises(Exception, match=r"the device can't be used after AcceleratorError: .*--retry-errors"):
            run(Toy(failing=failing), plan())
        assert [one["index"] for one in RunFolder(plan().out).records("full", "a")] == [0, 1]

    def test_chance_starts_anew_with_each_sample(self, plan):
        options = {"do_sample": True, "temperature": 2.0}
        elsewhere = ("--policies", "full", "--out", plan().out.with_name("whole"))
        expected = results(run(Toy(tasks=("a",), options=options), plan(*elsewhere)))
        stopped = Toy(tasks=("a",), options=options, failing={("a", "id2"): KeyboardInterrupt()})
        with pytest.raises(KeyboardInterrupt):
            run(stopped, plan("--policies", "full"))
        assert results(run(Toy(tasks=("a",), options=options), plan("--policies", "full"))) == expected
        elsewhere = ("--policies", "full", "--seed", 1, "--out", plan().out.with_name("other"))
        assert results(run(Toy(tasks=("a",), options=options), plan(*elsewhere))) != expected

    def test_progress_says_how_long_it_will_take(self, plan, capsys, monkeypatch):
        monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)
        run(Toy(samples=1), plan())
        lines = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"full a: 1 of 4 samples, .*, \d+ s left", lines[0])
        assert re.fullmatch(r"predictor-144 b: 4 of 4 samples, .*, in \d+ s", lines[-1])


class TestWhatIsRefused:
    """One line, before the model is loaded, and nothing is changed."""

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            (("--policies", "best"), "policy='best' is not allowed: expected one of full, streaming"),
            (("--policies", "full,"), "policy='' is not allowed"),
            (("--policies", "full,full"), "policies must differ in name, got full, full"),
            (("--budgets", "100"), "budget=100 is not allowed: expected at least sink"),
            (("--budgets", "few"), "--budgets few: expected numbers"),
            (("--rule", "quest,speed=1"), "unknown field 'speed'"),
            (("--rule", "quest,budget=512"), "set budgets with --budgets"),
            (("--rule", "../x: quest"), "'../x' can't name a directory"),
            (("--rule", "predictor,predictor=nowhere"), "nowhere: no such checkpoint"),
            (("--limit", "0"), "--limit 0: expected at least 1"),
            (("--dtype", "int3"), "--dtype int3: expected one of auto"),
            (("--device", "abacus"), "device='abacus' can't be used"),
        ],
    )
    def test_options(self, plan, options, line):
        with pytest.raises(Exception, match=re.escape(line)):
            plan(*options)

    @pytest.mark.parametrize(
        ("toy", "options", "line"),
        [
            ({"words": "Other words "}, (), "settings.words is 'Once upon a time ' there, asked for 'Other words '"),
            ({}, ("--seed", 3), "settings.seed is 0 there, asked for 3"),
            ({}, ("--limit", 3), "tasks.a.samples is 4 there, asked for 3"),
            ({}, ("--model", "other"), "settings.model is 'tiny' there, asked for 'other'"),
            ({"samples": 3}, (), "tasks.a.samples is 4 there, asked for 3"),
            (
                {},
                ("--rule", "predictor: predictor,sink=32"),
                "variants.predictor-144.sink is 64 there, asked for 32",
            ),
        ],
    )
    def test_the_directory_of_another_run(self, plan, toy, options, line, no_model):
        begin(Toy(), plan())
        before = (plan().out / "run.json").read_bytes()
        with pytest.raises(ConfigError, match=re.escape(line)):
            run(Toy(**toy), plan(*options))
        assert (plan().out / "run.json").read_bytes() == before

    @pytest.mark.parametrize("options", [(), ("--limit", 4)])
    def test_more_samples_behind_others(self, plan, no_model, options):
        class Changed(Toy):
            def samples(self, task):
                yield from (replace(one, prompt="Another") if one.id == "id1" else one for one in super().samples(task))

        begin(Toy(), plan("--limit", 2))
        with pytest.raises(ConfigError, match=r"tasks\.a\.sha256 is '"):
            run(Changed(), plan(*options))

    def test_other_samples(self, plan, no_model):
        class Changed(Toy):
            def samples(self, task):
                for sample in super().samples(task):
                    yield Sample(sample.id, sample.prompt, {"answers": ["another"]})

        begin(Toy(), plan())
        with pytest.raises(ConfigError, match=r"tasks\.a\.sha256 is '"):
            run(Changed(), plan())

    def test_more_policies_budgets_and_tasks_may_come(self, plan):
        run(Toy(tasks=("a",), samples=2), plan("--policies", "full"))
        more = Toy(tasks=("b",), samples=2)
        folder = run(more, plan("--policies", "streaming", "--budgets", "144,160"))
        assert len(more.asked) == 4
        assert folder.tasks == ("a", "b")
        assert folder.variants == ("full", "streaming-144", "streaming-160")
        assert len(folder.records("full", "a")) == 2
        assert folder.records("full", "b") == []

    def test_more_samples_may_come(self, plan):
        run(Toy(), plan("--limit", 1, "--policies", "full"))
        run(more := Toy(tasks=("a",)), plan("--limit", 3, "--policies", "full"))
        assert more.asked == [("a", "id1"), ("a", "id2")]
        folder = run(rest := Toy(), plan("--policies", "full"))
        assert rest.asked == [("a", "id3"), ("b", "id1"), ("b", "id2"), ("b", "id3")]
        assert {task: known["samples"] for task, known in folder.description["tasks"].items()} == {"a": 4, "b": 4}
        alone = run(Toy(), plan("--policies", "full", "--out", plan().out.with_name("alone")))
        assert results(folder) == results(alone)

    def test_runs_that_have_their_limit_among_the_settings(self, plan):
        run(Toy(), plan("--limit", 1, "--policies", "full"))
        file = plan().out / "run.json"
        saved = json.loads(file.read_text())
        saved["settings"] |= {"limit": 1, "samples": 4}
        file.write_text(json.dumps(saved))
        run(more := Toy(), plan("--limit", 2, "--policies", "full"))
        assert more.asked == [("a", "id1"), ("b", "id1")]
        assert not {"limit", "samples"} & json.loads(file.read_text())["settings"].keys()

    def test_a_predictor_that_changed(self, plan, tmp_path, no_model, monkeypatch):
        rule = ("--rule", "mine: predictor,predictor=mine")
        monkeypatch.chdir(tmp_path)
        predictor = AttentionPredictor.from_pretrained("default")
        predictor.save("mine")
        begin(Toy(), plan(*rule))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")  # the same directory
        begin(Toy(), plan("--rule", "mine: predictor,predictor=../mine"))
        RunFolder(plan().out).check(describe(Toy(), plan("--rule", "mine: predictor,predictor=../mine")))
        with torch.no_grad():
            next(predictor.parameters()).mul_(0.5)
        predictor.save(tmp_path / "mine")
        with pytest.raises(ConfigError, match=r"variants\.mine-144\.predictor_weights is '"):
            run(Toy(), plan("--rule", "mine: predictor,predictor=../mine"))

    def test_a_model_that_changed(self, plan, tmp_path, no_model):
        model = save_tiny_text_model(tmp_path / "model")
        begin(Toy(), plan("--model", model))
        RunFolder(plan().out).check(describe(Toy(), plan("--model", model)))
        (weights,) = model.glob("*.safetensors")
        changed = bytearray(weights.read_bytes())
        changed[-100] ^= 1
        weights.write_bytes(changed)
        with pytest.raises(ConfigError, match=r"settings\.weights is '"):
            run(Toy(), plan("--model", model))

    def test_two_rules_of_one_name(self, plan):
        with pytest.raises(ConfigError, match="two rules give variants of one name, a-144: names must differ"):
            plan("--rule", "a-144: full,prefetch=thread", "--rule", "a: predictor")

    def test_what_a_full_disk_left_is_no_other_run(self, plan):
        plan().out.mkdir()
        for name in (".lock", "run.json.draft"):
            (plan().out / name).touch()
        assert run(Toy(samples=1), plan("--policies", "full")) is not None

    def test_directories_that_are_no_runs(self, plan, no_model):
        out = plan().out
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        with pytest.raises(ConfigError, match="not empty and not the directory of a run"):
            run(Toy(), plan())
        (out / "run.json").write_text('{"benchmark": ')
        with pytest.raises(ConfigError, match=r"run\.json is not the description of a run"):
            run(Toy(), plan())
        for change in ({"tasks": []}, {"tasks": {"a": 3}}, {"tasks": {"a": {"sha256": "x"}}}, {"settings": 5}):
            whole = {"benchmark": "toy", "settings": {}, "tasks": {}, "variants": {}, "sessions": []} | change
            (out / "run.json").write_text(json.dumps(whole))
            with pytest.raises(ConfigError, match=r"run\.json is not the description of a run"):
                run(Toy(), plan())
        with pytest.raises(ConfigError, match="is not a directory"):
            run(Toy(), plan("--out", out / "thesis.txt"))
        with pytest.raises(ConfigError, match=r"not the directory of a run: no run\.json in it"):
            RunFolder.finished(out.parent)

    def test_two_runs_at_once(self, plan):
        folder = RunFolder(plan().out)
        nothing = {"benchmark": "toy", "settings": {}, "tasks": {}, "variants": {}}
        with (
            folder.opened(nothing, {}),
            pytest.raises(ConfigError, match="another run is writing to it"),
            RunFolder(plan().out).opened(nothing, {}),
        ):
            pass

    def test_samples_of_one_name_and_tasks_of_none(self, plan, no_model):
        class Twins(Toy):
            def samples(self, task):
                yield from (Sample("x", "one"), Sample("x", "two"))

        with pytest.raises(DataError, match="task a has two samples with id 'x'"):
            run(Twins(), plan())
        with pytest.raises(DataError, match="task a has no samples"):
            run(Toy(samples=0), plan())

    def test_an_environment_that_is_no_launcher_s(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(ConfigError, match="RANK is not set, but WORLD_SIZE=2: a launcher"):
            Processes()
        monkeypatch.setenv("RANK", "2")
        with pytest.raises(ConfigError, match="RANK='2' is not allowed: expected a number from 0 to 1"):
            Processes()
        monkeypatch.setenv("RANK", "1")
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        with pytest.raises(ConfigError, match="MASTER_ADDR is not set, but WORLD_SIZE=2"):
            Processes()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "here")
        with pytest.raises(ConfigError, match="MASTER_PORT='here' is not allowed"):
            Processes()
        monkeypatch.setenv("WORLD_SIZE", "two")
        with pytest.raises(ConfigError, match="WORLD_SIZE='two' is not allowed: expected 1 or more"):
            Processes()


class TestPredictions:
    def test_a_torn_line_is_cut_and_done_again(self, tmp_path):
        path = tmp_path / "a.jsonl"
        with Appender(path) as file:
            file.append({"index": 0, "pred": "线\u2028"})
        whole = path.read_bytes()
        path.write_bytes(whole + '{"index": 1, "pred": "线'.encode()[:-1])  # torn within a character
        with Appender(path) as file:
            file.append({"index": 1, "pred": "b"})
        assert [one["pred"] for one in gather(path)] == ["线\u2028", "b"]
        path.write_bytes(b'{"index": 0')
        cut_torn_line(path)
        assert path.read_bytes() == b""
        cut_torn_line(tmp_path / "none")

    def test_a_damaged_line_is_named(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"index": 0}\n{"index"\n')
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: not readable as JSON"):
            gather(path)
        path.write_text('{"index": 0}\n\n[1]\n')
        with pytest.raises(DataError, match=r"a\.jsonl, line 3: expected a JSON object, found list"):
            gather(path)
        path.write_text('{"pred": "x"}\n')
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: expected a number in 'index'"):
            gather(path)
        path.write_bytes(b"\xff\n")
        with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: not UTF-8 text"):
            gather(path)

    def test_parts_become_one_file(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"index": 3, "error": "x"}\n{"index": 0}\n')
        part(path, 0).write_text('{"index": 2}\n')
        part(path, 1).write_text('{"index": 3, "pred": "now"}\n{"index": 1}\n{"ind')
        fold(path)
        assert path.read_text() == '{"index": 0}\n{"index": 1}\n{"index": 2}\n{"index": 3, "pred": "now"}\n'
        assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]

    def test_killed_between_writing_the_file_and_removing_its_parts(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"index": 0}\n{"index": 1}\n')
        part(path, 1).write_text('{"index": 1}\n')
        fold(path)
        assert path.read_text() == '{"index": 0}\n{"index": 1}\n'

    def test_nothing_is_made_of_nothing(self, tmp_path):
        fold(tmp_path / "a.jsonl")
        assert list(tmp_path.iterdir()) == []


class TestSubject:
    def test_log_likelihoods_are_the_model_s(self, ids):
        model = make_tiny_model()
        prompt, text = ids(100)[0].tolist(), ids(9, seed=1)[0].tolist()
        logits = model(torch.tensor([prompt + text])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(text)]
        assert EvaluatedModel(model, None).log_likelihoods(prompt, text) == pytest.approx(expected, abs=1e-4)
        with attach(model, OffloadConfig(budget=144)) as engine:
            assert EvaluatedModel(model, engine).log_likelihoods(prompt, text) == pytest.approx(expected, abs=1e-4)
            assert EvaluatedModel(model, engine).log_likelihoods(prompt, []) == []

    def test_a_budget_shows_in_log_likelihoods(self, ids):
        model = make_tiny_model()
        prompt, text = ids(600)[0].tolist(), ids(9, seed=1)[0].tolist()
        stock = EvaluatedModel(model, None).log_likelihoods(prompt, text)
        with attach(model, OffloadConfig(budget=144, policy="streaming")) as engine:
            sparse = EvaluatedModel(model, engine).log_likelihoods(prompt, text)
        assert sparse[0] == pytest.approx(stock[0], abs=1e-4)  # from the prefill
        assert sparse[1:] != pytest.approx(stock[1:], abs=1e-2)

    def test_generation_is_greedy_and_stops(self, ids):
        model = make_tiny_model()
        model.generation_config.update(do_sample=True, temperature=3.0)
        prompt = ids(50)[0].tolist()
        tokens = EvaluatedModel(model, None).generate(prompt, 8)
        cache, expected, token = DynamicCache(), [], torch.tensor([prompt])
        for _ in range(8):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            expected.append(token.item())
        assert tokens == expected
        first = expected.index(expected[3])
        assert EvaluatedModel(model, None).generate(prompt, 8, stop=[expected[3]]) == expected[: first + 1]

    def test_what_does_not_fit(self, ids):
        evaluated = EvaluatedModel(make_tiny_model(max_position_embeddings=64), None)
        assert evaluated.context == 64
        with pytest.raises(ContextLengthError, match="positions for 64"):
            evaluated.generate(ids(60)[0].tolist(), 6)
        with pytest.raises(ContextLengthError, match="positions for 64"):
            evaluated.log_likelihoods(ids(60)[0].tolist(), [1] * 6)


def test_variants_by_rule_and_budget():
    rules = [Rule("full", {"policy": "full"}), Rule("mine", {"policy": "predictor", "late_fetch": 0.0})]
    variants = make_variants(rules, [256, 512])
    assert [(one.name, one.policy, one.budget) for one in variants] == [
        ("full", "full", None),
        ("mine-256", "predictor", 256),
        ("mine-512", "predictor", 512),
    ]
    assert variants[0].config is None
    assert variants[2].config == OffloadConfig(budget=512, late_fetch=0.0)


def test_variants_prefetch_as_is_fastest_or_as_their_rules_say():
    rules = [Rule(one, {"policy": one}) for one in ("full", "quest", "predictor")]
    rules.append(Rule("mine", {"policy": "predictor", "prefetch": "none"}))
    rules.append(Rule("paper", {"policy": "predictor", "calibration": "exact"}))
    found = [one.config.prefetch for one in make_variants(rules, [256]) if one.config is not None]
    assert found == ["auto", "auto", "none", "auto"]  # the engine knows where steps can be captured
    found = [one.config.prefetch for one in make_variants(rules, [256], prefetch="thread") if one.config is not None]
    assert found == ["thread", "thread", "none", "thread"]


def test_git_state(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)
        return done.stdout.decode().strip()

    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    assert git_state(file) is None
    git("init")
    assert git_state(file) is None  # in a checkout, but not of it
    git("add", "a.py")
    git("commit", "-m", "x")
    assert git_state(file) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    file.write_text("x = 2\n")
    assert git_state(file)["changed"] is True


def test_plain_table():
    table = text_table(("score", "a", "多"), [("full", 1.0, None), ("predictor-512", 33.333, 7)], ["note"])
    assert table.splitlines() == [
        "score              a  多",
        "full            1.00   –",
        "predictor-512  33.33   7",
        "note",
    ]


def test_devices_of_several_processes(monkeypatch):
    assert Processes().device("cuda") == "cuda"
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"} | launcher).items():
        monkeypatch.setenv(name, value)
    third = Processes()
    for gpus, device in ((2, "cuda:1"), (1, "cuda:0"), (0, "cuda:0")):  # that there is none is found when it is used
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert third.device("cuda") == device
    assert third.device("cuda:1") == "cuda:1"
    assert third.device("cpu") == "cpu"
    assert not third.is_main


class TestRealProcesses:
    """The command itself, in processes of its own."""

    TASKS = ("hotpotqa", "triviaqa")

    @pytest.fixture(scope="class")
    def command(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("real")
        model = save_tiny_text_model(folder / "model")
        data = write_longbench(folder / "data", self.TASKS, samples=4)
        command = [
            sys.executable,
            "-m",
            "attention_predictor.cli",
            "eval",
            "longbench",
            "--model",
            model,
            "--data",
            data,
        ]
        command += ["--no-chat", "--device", "cpu", "--tasks", ",".join(self.TASKS)]
        command += ["--policies", "streaming,quest", "--budgets", 144]
        return [str(one) for one in command]

    @pytest.fixture(scope="class")
    def undisturbed(self, command, tmp_path_factory) -> tuple[dict, str]:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        done = subprocess.run([*command, "--out", out], capture_output=True, text=True, check=True, env=ONE_THREAD)
        return results(RunFolder(out)), done.stdout

    def start(self, command, out, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ONE_THREAD | environment,
        )

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # several processes, each of which loads all libraries
    def test_killed_three_times(self, command, undisturbed, tmp_path):
        rng = random.Random(0)
        for lines in (1, 5, 11):
            process = self.start(command, tmp_path)
            while self.lines(tmp_path) < lines:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            time.sleep(rng.random() / 2)  # somewhere in a sample, or between two
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done = self.start(command, tmp_path).communicate()
        assert results(RunFolder(tmp_path)) == undisturbed[0]
        assert done[0] == undisturbed[1]

    def lines(self, folder: Path) -> int:
        return sum(file.read_bytes().count(b"\n") for file in folder.glob("*/*.jsonl*"))

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # several processes, each of which loads all libraries
    def test_two_processes_give_what_one_gives(self, command, undisturbed, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pair = [self.start(command, tmp_path, RANK=str(rank), **launcher) for rank in range(2)]
        printed = [process.communicate(timeout=240) for process in pair]
        assert [process.returncode for process in pair] == [0, 0], printed
        assert results(RunFolder(tmp_path)) == undisturbed[0]
        assert [out for out, _ in printed] == [undisturbed[1], ""]
        assert not list(tmp_path.glob("*/*.part*"))
        assert RunFolder(tmp_path).sessions[0]["processes"] == 2


def test_a_model_that_is_not_there_is_refused(capsys, tmp_path):
    data = write_longbench(tmp_path / "data", ["trec"])
    options = ["--data", str(data), "--tasks", "trec", "--model", "nowhere/at-all", "--out", str(tmp_path / "out")]
    assert main(["eval", "longbench", *options]) == 2
    assert "cannot load a tokenizer from 'nowhere/at-all'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
