"""Runs a benchmark: every sample of every task, under every policy and budget, with resume.

How a benchmark is made. Subclass ``Benchmark``: its tasks, the samples of each (lazily, always the same in the same
order), what decides its results besides the model (``settings``), and what a sample's record holds (``predict``, with
a ``EvaluatedModel`` that generates or tells likelihoods under the policy). Its command adds its own arguments to
``add_run_arguments`` (``commands/run_options.py``), refuses everything bad, makes a ``Plan`` and calls ``run``:

    plan = Plan.of(args)                                      # policies, budgets, output directory
    benchmark = MyBenchmark(load_tokenizer(args.model), ...)
    folder = run(benchmark, plan)                             # None in processes that are not the main one
    if folder is not None:
        ...folder.variants, folder.tasks, folder.records(variant, task)...

Scores are made from records alone, so that they can be made again without model and data: beside its benchmark each
module has ``sample_scores(task, records) -> list[float]``, where a record with an ``error`` scores as nothing found.

What ``run`` sees to:

- ``OUT/<variant>/<task>.jsonl``, a variant being ``full`` or ``<policy>-<budget>``: one line a sample, on disk before
  the next begins: ``Sample.record`` and what ``predict`` gave, ``id``, ``index``, ``seconds``, the engine's figures
  (``STATS``), and ``over_steps``, some of them step by step (``steps.StepSeries``). A sample that failed has ``error``
  in place of results and what ``Benchmark.missing`` says: it is counted, never left out.
- What is done is not done again: a run goes on where it was stopped or killed; ``--retry-errors`` tries failed samples
  once more. ``OUT/run.json`` has all settings, a digest of every task's samples, and each session's versions, git state
  and machine; other settings or other samples are refused. More policies, budgets and tasks may come.
- Everything that can be known to be wrong is refused before the model is loaded.
- Under ``accelerate launch`` or ``torchrun`` each process takes the next sample when it is done with one; the result is
  the same files. Whatever is random starts from seed, task and sample, not from what ran before.
- Greedy decoding, one sequence at a time, since a policy's budget is each sequence's own.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, product
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from attention_predictor.commands import run_options
from attention_predictor.errors import AttentionPredictorError, DataError, one_line
from attention_predictor.eval.harness.attached_model import AttachedModel
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.predictions import Appender, Record, part
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.provenance import describe_session
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.step_series import record_steps
from attention_predictor.eval.harness.variants import Variant, make_variants
from attention_predictor.loading import device_name, find_device, load_model
from attention_predictor.offload.stats import Stats
from attention_predictor.progress import Progress

# Of an engine's Stats, what each record keeps.
STATS = (
    *("steps", "hit_rate", "reuse_rate", "fetched_bytes", "late_bytes", "streamed_bytes", "exposed_wait_ms"),
    *("device_kv_bytes", "full_kv_bytes", "recovery", "relative_recovery"),
)
ERROR_CHARACTERS = 300
KEPT_SAMPLES = 256  # of all tasks: so many are kept in memory, where each variant would make them anew


@dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes:
        id: Its name, unique in its task.
        prompt: What the model is given, as text; ``predict`` tokenises it.
        record: What its line holds beside the prediction, such as ``answers``.
        hidden: What ``predict`` needs beside the prompt and no line holds.
    """

    id: str
    prompt: str
    record: Mapping[str, Any] = field(default_factory=dict)
    hidden: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """The interface of a benchmark: tasks, their samples, and what to record of each.

    Attributes:
        name: As in ``attnpred eval <name>``.
        tasks: In the order of the table.
        missing: What a failed sample's record holds in place of a prediction.
    """

    name: ClassVar[str]
    missing: ClassVar[Mapping[str, Any]] = {"pred": ""}
    tasks: Sequence[str]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Settings that decide results, besides model, policies, seed and limit, as plain values."""

    @abstractmethod
    def samples(self, task: str) -> Iterator[Sample]:
        """The samples of a task, one at a time; ``DataError`` for a bad one. Called several times."""

    @abstractmethod
    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        """What the record holds of this sample's prediction. Whatever it raises is recorded as the sample's error."""

    def check(self, task: str, limit: int | None) -> dict[str, Any]:
        """Read all samples once, before the model loads.

        Returns:
            ``samples``, their number, and ``sha256``, by which other data is told. A benchmark that makes its samples
            at some cost may say both without making them.

        Raises:
            DataError: A sample is bad, there is none, or two have one id.
        """
        ids, digest = set(), hashlib.sha256()
        for sample in islice(self.samples(task), limit):
            if sample.id in ids:
                raise DataError(f"{self.name}: task {task} has two samples with id {sample.id!r}")
            ids.add(sample.id)
            parts = [sample.id, sample.prompt, dict(sample.record), dict(sample.hidden)]
            digest.update(json.dumps(parts, sort_keys=True).encode())
        if not ids:
            raise DataError(f"{self.name}: task {task} has no samples")
        return {"samples": len(ids), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Plan:
    """Model, variants and output directory of a run.

    Attributes:
        load: Gives the model, by name, device and dtype; ``None`` for one that nobody else uses.
    """

    model: str
    device: str
    dtype: str
    seed: int
    limit: int | None
    out: Path
    retry_errors: bool
    variants: Sequence[Variant]
    load: Callable[[str, str, str], PreTrainedModel] | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, **defaults: Any) -> Plan:
        """From ``add_run_arguments``; ``ConfigError`` or ``CheckpointError`` for a bad option.

        Args:
            defaults: Fields of ``OffloadConfig`` for every rule that does not set them.
        """
        run_options.check(args)
        name = device_name(args.device)
        find_device(Processes().device(name))  # this process's own: to look at another's takes memory
        variants = make_variants(
            run_options.rules_of(args), run_options.budgets_of(args), prefetch=args.prefetch, **defaults
        )
        # The same model by another path is the same model.
        model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
        load = vars(args).get("load")  # of `eval several`
        return cls(model, name, args.dtype, args.seed, args.limit, args.out, args.retry_errors, variants, load)

    def at(self, out: Path) -> Plan:
        """The same plan with another output directory."""
        return replace(self, out=out)

    def settings(self) -> dict[str, Any]:
        """What decides results for all variants."""
        device = torch.device(self.device).type
        return {"model": self.model, "device": device, "dtype": self.dtype, "seed": self.seed, "limit": self.limit}


def describe(benchmark: Benchmark, plan: Plan) -> dict[str, Any]:
    """The run's settings for ``run.json``, with a digest of every task's samples; reads every sample once."""
    description = {
        "benchmark": benchmark.name,
        "settings": plan.settings() | benchmark.settings(),
        "tasks": {task: benchmark.check(task, plan.limit) for task in benchmark.tasks},
        "variants": {variant.name: variant.describe() for variant in plan.variants},
    }
    return json.loads(json.dumps(description))  # as it will be read back: no tuples


def run(benchmark: Benchmark, plan: Plan) -> RunFolder | None:
    """Run all samples that are not done; returns the results in the main process, ``None`` in others.

    Raises:
        DataError, ConfigError, CheckpointError: What can't be run, before the model is loaded.
    """
    description = describe(benchmark, plan)
    RunFolder(plan.out).check(description)
    with Processes() as processes, ExitStack() as stack:
        folder = RunFolder(plan.out)
        if processes.is_main:
            folder.check(description)  # again: another run may have begun here in the meantime
            stack.enter_context(folder.opened(description, describe_session(processes.count)))
            folder.fold()
        processes.wait()
        work = _Work.of(benchmark, plan, folder, processes, description["tasks"])
        processes.wait()  # until all have seen the same left to do
        if work.left:
            device = torch.device(processes.device(plan.device))
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # what names no number, such as a stream, means this one
            work.do((plan.load or load_model)(plan.model, str(device), plan.dtype))
        processes.wait()
        if not processes.is_main:
            return None
        folder.fold()
        return folder


@dataclass
class _Work:
    """A run's samples, ``total`` in number, of which those ``left`` are to be done: variant, task and index."""

    benchmark: Benchmark
    plan: Plan
    folder: RunFolder
    processes: Processes
    total: int
    left: Sequence[tuple[Variant, str, int]]
    kept: dict[str, list[Sample]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        benchmark: Benchmark,
        plan: Plan,
        folder: RunFolder,
        processes: Processes,
        tasks: Mapping[str, Mapping[str, Any]],
    ) -> _Work:
        total, left = 0, []
        for variant, task in product(plan.variants, benchmark.tasks):
            records = folder.records(variant.name, task)
            done = {one["index"] for one in records if not (plan.retry_errors and "error" in one)}
            samples = tasks[task]["samples"]
            total += samples
            left += [(variant, task, index) for index in range(samples) if index not in done]
        return cls(benchmark, plan, folder, processes, total, left)

    def do(self, model: PreTrainedModel) -> None:
        """Run the samples that no other process takes."""
        quiet = not self.processes.is_main
        done = self.total - len(self.left)
        with Progress(self.benchmark.name, self.total, "samples", done=done, quiet=quiet) as progress:
            mine = ((number, *self.left[number]) for number in self.processes.numbers(len(self.left)))
            for variant, tasks in groupby(mine, key=itemgetter(1)):
                with AttachedModel(model, variant) as attached:
                    for task, samples in groupby(tasks, key=itemgetter(2)):
                        progress.describe(f"{variant.name} {task}")
                        self._do_task(attached, task, ((number, index) for number, _, _, index in samples), progress)

    def _do_task(self, attached: AttachedModel, task: str, mine: Iterator[tuple[int, int]], progress: Progress) -> None:
        """Samples by number, for the progress, which counts those of all processes, and index, in their order."""
        path = self.folder.results(attached.variant.name, task)
        samples = enumerate(self._samples(task))
        with Appender(part(path, self.processes.rank) if self.processes.count > 1 else path) as results:
            for number, index in mine:
                sample = next(sample for place, sample in samples if place == index)
                record = _attempt(self.benchmark, self.plan.seed, attached, task, sample)
                results.append({"index": index} | record)
                progress.reach(self.total - len(self.left) + number + 1)
                if record.get("error", "").startswith(torch.AcceleratorError.__name__):
                    raise AttentionPredictorError(
                        f"the device is of no use after {record['error']}; run the command again, with --retry-errors"
                    )

    def _samples(self, task: str) -> Iterable[Sample]:
        """A task's samples; up to ``KEPT_SAMPLES`` are kept in memory for all variants."""
        asked = {(task, index) for _, task, index in self.left}
        if len(asked) > KEPT_SAMPLES:
            return self.benchmark.samples(task)
        if task not in self.kept:
            last = max(index for name, index in asked if name == task)
            self.kept[task] = list(islice(self.benchmark.samples(task), last + 1))
        return self.kept[task]


def _attempt(benchmark: Benchmark, seed: int, attached: AttachedModel, task: str, sample: Sample) -> Record:
    """Run one sample; an exception becomes the record's ``error``."""
    name = f"{seed}/{task}/{sample.id}".encode("utf-8", "backslashreplace")  # ids may be any text
    torch.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1)
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    try:
        with attached.sample() as engine, record_steps(attached.model, engine) as series:
            found = benchmark.predict(EvaluatedModel(attached.model, engine), task, sample)
            if engine is not None:
                figures = _figures(engine.stats) | ({"over_steps": series.record()} if series.steps else {})
    except Exception as error:  # recorded, and counted in the table: whatever it is, the other samples go on
        found = dict(benchmark.missing) | {"error": f"{type(error).__name__}: {one_line(error, ERROR_CHARACTERS)}"}
    if "error" in found:  # out here, where the error and what its frames held is gone
        gc.collect()
        torch.cuda.empty_cache()
    return {"id": sample.id} | found | dict(sample.record) | {"seconds": time.perf_counter() - started} | figures


def _figures(stats: Stats) -> dict[str, Any]:
    known = stats.to_dict()
    figures = {name: known[name] for name in STATS}
    return figures | ({"fallbacks": known["fallbacks"]} if known["fallbacks"] else {})
