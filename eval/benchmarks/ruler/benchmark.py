"""RULER as a benchmark of the runner: samples made here, or samples made by RULER itself."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.fixed_length import FixedLengthBenchmark, paragraph_end, prefixed_ids
from attention_predictor.eval.benchmarks.haystack import Draft
from attention_predictor.eval.benchmarks.ruler.base import Sources
from attention_predictor.eval.benchmarks.ruler.families import FAMILIES, check_family
from attention_predictor.eval.benchmarks.ruler.scorer import AT, family_name
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.prompts import check_chat
from attention_predictor.eval.harness.runner import Benchmark, Sample
from attention_predictor.kinds import is_number
from attention_predictor.reading import check_unicode, read_lines

RULER_FILE = "validation"  # RULER writes <task>/validation.jsonl


class MadeRuler(FixedLengthBenchmark):
    """Samples of RULER's families; a task for each family and length.

    Raises:
        ConfigError: A family lacks the text it needs, a length is named twice, or what ``FilledBenchmark`` refuses.
    """

    name = "ruler"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        families: Sequence[str],
        lengths: Sequence[int],
        sources: Sources,
        *,
        samples: int = 100,
        chat: bool = True,
        context: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(set(lengths)) < len(lengths):
            raise ConfigError(f"--lengths {','.join(map(str, lengths))}: a value is given twice")
        for name in families:
            has = name in sources.passages or (sources.haystack is not None and name not in ("qa_1", "qa_2"))
            if (option := FAMILIES[name].option) is not None and not has:
                raise ConfigError(f"RULER task {name} needs {option}")
        super().__init__(tokenizer, chat=chat, context=context, count=samples, seed=seed)
        self.tasks = tuple(f"{name}{AT}{length}" for length in lengths for name in families)
        self.sources = sources

    def settings(self) -> dict[str, Any]:
        haystack = None if self.sources.haystack is None else self.sources.haystack.sha256
        passages = {task: one.sha256 for task, one in self.sources.passages.items()}
        return super().settings() | {
            "made": True,
            "wording": self.sources.wording,
            "haystack": haystack,
            "passages": passages,
        }

    def length(self, task: str) -> int:
        return int(task.partition(AT)[2])

    def new_tokens(self, task: str) -> int:
        return FAMILIES[family_name(task)].new_tokens

    def stop(self) -> Sequence[int]:
        """With the pocket model's wording an empty line ends the answer."""
        return () if self.chat or self.sources.wording != "pocket" else paragraph_end(self.tokenizer)

    def draft(self, task: str, number: int, rng: random.Random) -> Draft:
        return FAMILIES[family_name(task)].draft(rng, self.sources, self.length(task))


class GivenRuler(Benchmark):
    """Samples in RULER's form: lines of JSON with ``input``, ``outputs`` and perhaps ``answer_prefix``.

    Args:
        files: Files by task.
        chat: Inputs as a user's turn in the model's chat template, the answer's beginning behind it where it is given
            by itself. Not for inputs that RULER has put into a template already.
    """

    name = "ruler"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        files: dict[str, Path],
        *,
        chat: bool = True,
        context: int | None = None,
    ) -> None:
        if chat:
            check_chat(tokenizer, "--no-chat gives inputs as they are")
        self.tokenizer, self.files, self.chat, self.context = tokenizer, files, chat, context
        self.tasks = tuple(files)

    def settings(self) -> dict[str, Any]:
        return {"chat": self.chat, "made": False}

    def samples(self, task: str) -> Iterator[Sample]:
        for number, row in read_lines(self.files[task]):
            where = f"{self.files[task]}, line {number}"
            if not isinstance(row.get("input"), str):
                raise DataError(f"{where}: expected a text in 'input'; found fields {', '.join(row)}")
            answers = row.get("outputs")
            if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
                raise DataError(f"{where}: expected a list of texts in 'outputs'; found {answers!r:.40}")
            prefix = row.get("answer_prefix") or ""
            if not isinstance(prefix, str):
                raise DataError(f"{where}: expected a text in 'answer_prefix'; found {prefix!r:.40}")
            length = row.get("length")
            if length is not None and not is_number(length):
                raise DataError(f"{where}: expected a number in 'length'; found {length!r:.40}")
            for one in (row["input"], prefix):
                check_unicode(one, where)
            text = row["input"].removesuffix(prefix)
            name = str(row.get("index", number - 1))
            yield Sample(name, text, {"answers": answers, "length": length}, {"prefix": prefix})

    def check(self, task: str, limit: int | None) -> dict[str, Any]:
        """Also refuse samples longer than the model's positions, judged by the sample with most characters."""
        found = super().check(task, limit)
        longest = max(self.samples(task), key=lambda one: len(one.prompt))
        tokens = len(self.prompt(longest)) + FAMILIES[task].new_tokens
        if self.context is not None and tokens > self.context:
            raise DataError(
                f"{self.files[task]}: sample {longest.id} has {tokens} tokens with its answer; the model has positions "
                f"for {self.context}"
            )
        return found

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        return evaluated.predict(self.tokenizer, self.prompt(sample), FAMILIES[task].new_tokens)

    def prompt(self, sample: Sample) -> list[int]:
        return prefixed_ids(self.tokenizer, sample.prompt, sample.hidden["prefix"], chat=self.chat)


def find_files(path: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """Files of samples by task: one ``<task>.jsonl``, or those of a directory, or ``<task>/validation.jsonl`` in it.

    Args:
        names: Tasks that are wanted; ``None`` for all that are there.

    Raises:
        DataError: There is no such file or directory, or no samples of a wanted task in it.
        ConfigError: A single file's name is no task's.
    """
    if path.is_file():
        name = path.parent.name if path.stem == RULER_FILE else path.stem
        check_family(name)
        found = {name: path}
    elif path.is_dir():
        places = {name: (path / f"{name}.jsonl", path / name / f"{RULER_FILE}.jsonl") for name in FAMILIES}
        found = {name: file for name, files in places.items() for file in files if file.is_file()}
    else:
        raise DataError(f"--data {path}: no such file or directory")
    for name in names if names is not None else ():
        if name not in found:
            raise DataError(f"--data {path}: no {name}.jsonl in it")
    if not found:
        raise DataError(f"--data {path}: expected <task>.jsonl, a task being one of {', '.join(FAMILIES)}")
    return found if names is None else {name: found[name] for name in names}
