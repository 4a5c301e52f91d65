r"""GSM8K, MATH and AIME as the runner takes them: problems, chains of thought, and how their answers are scored.

GSM8K: Cobbe et al. 2021 (arXiv 2110.14168). MATH: Hendrycks et al. 2021 (arXiv 2103.03874). AIME: examinations of the
Mathematical Association of America, answers from 0 to 999.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.reasoning.answers import find_answer, same_answer
from attention_predictor.eval.benchmarks.reasoning.kinds import KINDS, Kind, Sampling
from attention_predictor.eval.benchmarks.reasoning.prompts import ASK, END, as_task, behind_examples
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.prompts import prompt_ids
from attention_predictor.eval.harness.runner import Benchmark, Sample
from attention_predictor.reading import check_unicode, read_lines

PROBLEM_FIELDS = ("problem", "question", "prompt")
MARK = "####"  # before the answer, in GSM8K's solutions


class Reasoning(Benchmark):
    """Problems solved by a chain of thought, one file of them a task.

    A model with a chat template is told to think step by step and to box its answer; another one sees four solved
    problems first, and its answer ends where it goes on to a next problem.

    Args:
        folder: Has ``<task>.jsonl``, the task's name beginning with one of ``KINDS``.
        few_shot: Behind examples, even if there is a chat template.
        max_new_tokens: Replaces the kinds' own limits.
        context: Tokens that the model has positions for, if limited.
    """

    name = "reasoning"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        tasks: Sequence[str],
        *,
        few_shot: bool = False,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
        self.tokenizer, self.folder, self.tasks = tokenizer, folder, tuple(tasks)
        self.chat = not few_shot and bool(getattr(tokenizer, "chat_template", None))
        self.max_new_tokens, self.context = max_new_tokens, context
        self.sampling = sampling if sampling is not None else Sampling()

    def settings(self) -> dict[str, Any]:
        sampling = {name: getattr(self.sampling, name) for name in ("temperature", "top_p", "repeats")}
        return {"chat": self.chat, "max_new_tokens": self.max_new_tokens} | sampling

    def samples(self, task: str) -> Iterator[Sample]:
        for number, (where, row) in enumerate(_rows(self.folder / f"{task}.jsonl")):
            problem, answer = read_problem(row, where)
            prompt = as_task(problem) if self.chat else behind_examples(problem, kind(task).examples)
            name = str(row.get("id", row.get("unique_id", number)))
            for repeat in range(self.sampling.repeats):
                again = f"#{repeat}" if repeat else ""
                yield Sample(name + again, prompt, {"answers": [answer]})

    def check(self, task: str, limit: int | None) -> dict[str, Any]:
        """Also refuses problems whose chain of thought the model has no positions for."""
        found = super().check(task, limit)
        if self.context is not None:
            longest = max((sample.prompt for sample in self.samples(task)), key=len)
            prompt, new = len(prompt_ids(self.tokenizer, longest, chat=self.chat)), self._new_tokens(task)
            if prompt + new > self.context:
                raise ConfigError(
                    f"task {task}: a prompt of {prompt} tokens and {new} new tokens exceed the model's "
                    f"{self.context} positions: choose a smaller --max-new-tokens"
                )
        return found

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        prompt = prompt_ids(self.tokenizer, sample.prompt, chat=self.chat)
        options = self.sampling.options()
        if not self.chat:
            options |= {"stop_strings": [END + ASK], "tokenizer": self.tokenizer}
        found = evaluated.predict(self.tokenizer, prompt, self._new_tokens(task), **options)
        return found if self.chat else found | {"pred": found["pred"].split(END + ASK)[0]}

    def _new_tokens(self, task: str) -> int:
        return self.max_new_tokens or kind(task).max_new_tokens


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """1 where the answer found in the prediction is the reference's, else 0."""
    numeric = kind(task).numeric
    return [
        float("error" not in one and same_answer(find_answer(one["pred"], numeric=numeric), one["answers"][0]))
        for one in records
    ]


def choose_tasks(folder: Path, names: str) -> tuple[str, ...]:
    """``"gsm8k_test,aime24"``, or ``"all"`` files whose name begins with a kind's, but those of training data.

    Raises:
        DataError: No such directory, or nothing in it that is known.
        ConfigError: A name that is no file's there; lists the valid ones.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such directory")
    there = [file.stem for file in sorted(folder.glob("*.jsonl")) if file.stem.startswith(tuple(KINDS))]
    if not there:
        expected = ", ".join(f"{name}*.jsonl" for name in KINDS)
        raise DataError(f"--data {folder}: expected files named {expected}, found none")
    if names == "all":
        return tuple(name for name in there if "train" not in name) or tuple(there)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in there:
            raise ConfigError(f"no reasoning task {name!r} in {folder}: expected some of {', '.join(there)}")
    return tuple(name for name in there if name in wanted)


def kind(task: str) -> Kind:
    """What a task's name says of it."""
    return next(found for name, found in KINDS.items() if task.startswith(name))


def read_problem(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """A row's problem and answer; ``DataError`` names the place and the field."""
    problem = next((row[name] for name in PROBLEM_FIELDS if isinstance(row.get(name), str)), None)
    if problem is None:
        raise DataError(
            f"{where}: expected a text in one of {', '.join(PROBLEM_FIELDS)}; found fields {', '.join(row)}"
        )
    check_unicode(problem, where)
    answer = row.get("answer", row.get("solution"))
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        found = f"{answer!r:.40}" if answer is not None else f"fields {', '.join(row)}"
        raise DataError(f"{where}: expected a text or number in 'answer', or a text in 'solution'; found {found}")
    text = str(answer)
    if MARK in text:
        text = text.rpartition(MARK)[2].strip()
    elif "answer" not in row:
        text = find_answer(text, numeric=False) or ""
    if not text:
        raise DataError(f"{where}: it has no answer")
    return problem, text


def _rows(file: Path) -> Iterator[tuple[str, Record]]:
    for number, row in read_lines(file):
        yield f"{file}, line {number}", row
