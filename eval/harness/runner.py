"""Runs a benchmark: every sample of every task, under every policy and budget, with resume.

To write a benchmark, subclass ``Benchmark``. It gives the tasks, the samples of each (lazily, in a fixed order), the
settings that decide its results (``settings``), and the record of a sample (``predict``, which gets an
``EvaluatedModel`` under the policy). Its command adds its options to ``add_run_arguments``
(``commands/run_options.py``), checks them, makes a ``Plan`` and calls ``run``:

    plan = Plan.of(args)                                      # policies, budgets, output directory
    benchmark = MyBenchmark(load_tokenizer(args.model), ...)
    return show_results(run(benchmark, plan), MEASURE)        # scores.py: prints the table

Scores are computed from records only, so they can be computed again without model and data: ``MEASURE``
(``measure.py``) has ``sample_scores(task, records) -> list[float]``, in which a record with an ``error`` scores the
worst value, or NaN if there is no worst.

``run`` guarantees:

- ``OUT/<variant>/<task>.jsonl`` has one line for each sample, written before the next sample begins. A variant is
  ``full`` or ``<policy>-<budget>``. A line holds ``Sample.record``, the result of ``predict``, ``id``, ``index``,
  ``seconds``, the engine's stats (``STATS``), and ``over_steps`` (``step_series.StepSeries``). A failed sample has an
  ``error`` and the values of ``Benchmark.missing``; it is counted, not left out.
- A run resumes after an interruption; ``--retry-errors`` runs failed samples again. ``OUT/run.json`` has all settings,
  a digest of every task's samples, and versions, git state and machine of each session. A run with other settings or
  samples is refused; more policies, budgets, tasks, and samples behind the first ones can be added.
- Bad input is refused before the model is loaded.
- Under ``accelerate launch`` or ``torchrun`` each process takes the next sample when it is free; the files are the
  same. With ``--tp`` they divide the model instead, and do every sample together; engine's stats are the first one's.
  Random numbers depend on seed, task and sample only.
- Decoding is greedy, one sequence at a time, since a budget is per sequence.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, islice, product
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from attention_predictor.commands import run_options
from attention_predictor.errors import (
    AttentionPredictorError,
    ConfigError,
    ContextLengthError,
    DataError,
    HostMemoryError,
    one_line,
)
from attention_predictor.eval.harness.attached_model import AttachedModel
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.predictions import Appender, Record, part
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.provenance import describe_model, describe_session
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.step_series import record_steps
from attention_predictor.eval.harness.variants import Variant, make_variants
from attention_predictor.launcher import Launcher
from attention_predictor.loading import device_name, find_device, load_model
from attention_predictor.offload.stats import Stats
from attention_predictor.progress import Progress

# Fields of the engine's Stats in each record.
STATS = (
    *("steps", "hit_rate", "reuse_rate", "fetched_bytes", "late_bytes", "streamed_bytes", "exposed_wait_ms"),
    *("device_kv_bytes", "full_kv_bytes", "recovery", "relative_recovery"),
)
ERROR_CHARACTERS = 300
REFUSALS = (ConfigError, ContextLengthError, DataError, HostMemoryError)
KEPT_SAMPLES = 256  # at most; more samples are generated again for each variant


@dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes:
        id: The sample's name, unique in its task.
        prompt: The prompt as text; ``predict`` tokenises it.
        record: Fields of its line besides the prediction, such as ``answers``.
        hidden: Inputs of ``predict`` besides the prompt; not written.
    """

    id: str
    prompt: str
    record: Mapping[str, Any] = field(default_factory=dict)
    hidden: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """The interface of a benchmark: tasks, their samples, and what to record of each.

    Attributes:
        name: The name in ``attnpred eval <name>``.
        tasks: Task names, in the order of the table.
        missing: Fields of a failed sample's record.
        measures_heads: Whether it measures the heads that a process has; then ``--tp``, which divides them, is refused.
    """

    name: ClassVar[str]
    measures_heads: ClassVar[bool] = False
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

    def prepare(self, stock: EvaluatedModel, samples: Iterable[tuple[str, Sample]], processes: Processes) -> None:
        """Do what needs the stock model before any policy runs; each process does its share.

        Args:
            samples: All of the run, each with its task.
        """
        return  # most benchmarks need nothing

    def check(self, task: str, limit: int | None) -> dict[str, Any]:
        """Read all samples once, before the model loads.

        Returns:
            ``samples``, their number, and ``sha256``, a digest of the data. A benchmark whose samples are expensive may
            return both without making them.

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
        load: Loads the model, by name, device and dtype; ``None`` for ``load_model``.
        check_only: Refuse bad input, and run nothing.
    """

    model: str
    device: str
    dtype: str
    seed: int
    limit: int | None
    out: Path
    retry_errors: bool
    variants: Sequence[Variant]
    load: Callable[..., PreTrainedModel] | None = None  # as ``load_model``
    divide_model: bool = False
    device_map: str | None = None
    check_only: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, **defaults: Any) -> Plan:
        """From ``add_run_arguments``; ``ConfigError`` or ``CheckpointError`` for a bad option.

        Args:
            defaults: Fields of ``OffloadConfig`` for every rule that does not set them.
        """
        run_options.check(args)
        name = device_name(args.device)
        find_device(Processes().device(name))  # this process's own: querying another one takes memory
        variants = make_variants(
            run_options.rules_of(args), run_options.budgets_of(args), prefetch=args.prefetch, **defaults
        )
        model = _one_path(args.model)
        given = (args.dtype, args.seed, args.limit, args.out, args.retry_errors)
        return cls(
            *(model, name, *given, variants),
            load=getattr(args, "load", None),  # these are set by ``eval several``
            check_only=getattr(args, "check_only", False),
            divide_model=getattr(args, "tp", False),  # ``analyze`` has no such options
            device_map=getattr(args, "device_map", None),
        )

    def settings(self) -> dict[str, Any]:
        """What decides results for all variants."""
        device = torch.device(self.device).type
        run = {"model": self.model, "device": device, "dtype": self.dtype, "seed": self.seed}
        return run | describe_model(self.model)


def _one_path(model: str) -> str:
    """The name of a model; different paths of one model give the same name."""
    path = Path(model)
    if path.is_dir():
        return str(path.resolve())
    return str(path.parent.resolve() / path.name) if path.is_file() else model  # a link may be to a file without suffix


def describe(benchmark: Benchmark, plan: Plan) -> dict[str, Any]:
    """The run's settings for ``run.json``, with a digest of every task's samples; reads every sample once."""
    description = {
        "benchmark": benchmark.name,
        "settings": plan.settings() | benchmark.settings(),
        "tasks": {task: benchmark.check(task, plan.limit) for task in benchmark.tasks},
        "variants": {variant.name: variant.describe() for variant in plan.variants},
    }
    return json.loads(json.dumps(description))  # as run.json will be read: no tuples


def run(benchmark: Benchmark, plan: Plan) -> RunFolder | None:
    """Run all samples that are not done; returns the results in the main process.

    ``None`` in other processes, and where ``plan.check_only`` is set.

    Raises:
        DataError, ConfigError, CheckpointError: Bad input, found before the model is loaded.
    """
    with Launcher().as_one() if plan.divide_model else nullcontext():
        return _run(benchmark, plan)


def _run(benchmark: Benchmark, plan: Plan) -> RunFolder | None:
    if plan.divide_model and (
        benchmark.measures_heads or any(one.config is not None and one.config.measure_recovery for one in plan.variants)
    ):
        raise ConfigError(f"--tp: {benchmark.name} measures every head, of which each process has a part: leave it out")
    description = describe(benchmark, plan)
    _check(RunFolder(plan.out), benchmark, description)
    if plan.check_only:
        return None
    with Processes(divide_model=plan.divide_model) as processes, ExitStack() as stack:
        folder = RunFolder(plan.out)
        if processes.is_main:
            _check(folder, benchmark, description)  # again: another run may have begun here in the meantime
            stack.enter_context(folder.opened(description, describe_session(processes.count)))
            folder.fold()
        processes.wait()
        work = _Work.of(benchmark, plan, folder, processes, description["tasks"])
        processes.wait()  # so that all processes list the same samples
        if work.left:
            device = torch.device(processes.device(plan.device))
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # streams and other unnumbered objects use this device
            model = (plan.load or load_model)(plan.model, str(device), plan.dtype, processes.ranks, plan.device_map)
            every = ((task, one) for task in benchmark.tasks for one in islice(benchmark.samples(task), plan.limit))
            benchmark.prepare(EvaluatedModel(model, None), every, processes)
            processes.wait()
            work.do(model)
        processes.wait()
        if not processes.is_main:
            return None
        folder.fold()
        return folder


def _check(folder: RunFolder, benchmark: Benchmark, description: Mapping[str, Any]) -> None:
    """``RunFolder.check``; of a task with more samples than before only the first ones must be the same."""
    tasks, before = dict(description["tasks"]), folder.description.get("tasks", {})
    for task in tasks.keys() & before.keys():
        if (samples := before[task]["samples"]) < tasks[task]["samples"]:
            tasks[task] = benchmark.check(task, samples)
    folder.check({**description, "tasks": tasks})


@dataclass
class _Work:
    """The samples of a run: ``total`` of them, ``left`` still to do (variant, task, index)."""

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
        """Run samples given by number (for the progress over all processes) and index, in order."""
        path = self.folder.results(attached.variant.name, task)
        samples = enumerate(self._samples(task))
        shared = self.processes.count > 1 and self.processes.ranks == 1
        path = part(path, self.processes.rank) if shared else path
        with Appender(path) if self.processes.writes else nullcontext() as results:
            for number, index in mine:
                sample = next(sample for place, sample in samples if place == index)
                divided = self.processes.ranks > 1
                record = _attempt(self.benchmark, self.plan.seed, attached, task, sample, divided=divided)
                if results is not None:
                    results.append({"index": index} | record)
                progress.reach(self.total - len(self.left) + number + 1)
                if record.get("error", "").startswith(torch.AcceleratorError.__name__):
                    raise AttentionPredictorError(
                        f"the device can't be used after {record['error']}; run the command again with --retry-errors"
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


def _attempt(
    benchmark: Benchmark, seed: int, attached: AttachedModel, task: str, sample: Sample, *, divided: bool = False
) -> Record:
    """Run one sample; an exception becomes the record's ``error``.

    With a ``divided`` model only a refusal does, which all processes share: after another exception the others would
    wait for this one for ever.
    """
    name = f"{seed}/{task}/{sample.id}".encode("utf-8", "backslashreplace")  # ids may be any text
    torch.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1)
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    try:
        with attached.sample() as engine, record_steps(attached.model, engine) as series:
            found = benchmark.predict(EvaluatedModel(attached.model, engine), task, sample)
            if engine is not None:
                figures = _figures(engine.stats) | ({"over_steps": series.record()} if series.steps else {})
    except Exception as error:  # recorded and counted in the table; the other samples run on
        if divided and not isinstance(error, REFUSALS):
            raise
        found = dict(benchmark.missing) | {"error": f"{type(error).__name__}: {one_line(error, ERROR_CHARACTERS)}"}
    if "error" in found:  # outside the handler: the error and its frames are freed
        gc.collect()
        torch.cuda.empty_cache()
    return {"id": sample.id} | found | dict(sample.record) | {"seconds": time.perf_counter() - started} | figures


def _figures(stats: Stats) -> dict[str, Any]:
    known = stats.to_dict()
    figures = {name: known[name] for name in STATS}
    return figures | ({"fallbacks": known["fallbacks"]} if known["fallbacks"] else {})
