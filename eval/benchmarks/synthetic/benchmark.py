"""The pocket model's own tasks (``synthetic.py``), a benchmark of the runner: answers found in documents."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from attention_predictor.arithmetic import ceil_div
from attention_predictor.documents import opening
from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.recovery.judge import Case
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.benchmarks.synthetic.documents import plant, read_texts
from attention_predictor.eval.harness.evaluated_model import Subject
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.prompts import check_context
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Benchmark, Plan, Sample, run
from attention_predictor.eval.harness.scores import conclude, mean_scores, means_table
from attention_predictor.eval.harness.teacher_forcing import decode_tails, new_cache, prefill
from attention_predictor.loading import load_tokenizer


class Planted(Benchmark):
    """Documents with planted statements, each a sample with all its questions.

    Args:
        texts: To plant in, by name.
        tasks: Of ``synthetic.TASKS``.
        questions: Of each task, rounded up to whole documents.
        per_document: Questions about a document, decoded as a batch.
        context: Tokens of a document and any one question.
    """

    name = "synthetic"
    missing: ClassVar[Mapping[str, Any]] = {"found": []}

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: dict[str, str],
        tasks: Sequence[str],
        *,
        questions: int = 100,
        per_document: int = 20,
        context: int = 8192,
        seed: int = 0,
    ) -> None:
        synthetic.check_tasks(tasks)
        for option, value in (("--questions", questions), ("--per-document", per_document)):
            if value < 1:
                raise ConfigError(f"{option} {value}: expected at least 1")
        self.tokenizer, self.texts, self.tasks = tokenizer, texts, tuple(tasks)
        self.documents, self.per_document = ceil_div(questions, per_document), per_document
        self.context, self.seed = context, seed

    def settings(self) -> dict[str, Any]:
        return {"documents": self.documents, "per_document": self.per_document, "context": self.context}

    def samples(self, task: str) -> Iterator[Sample]:
        planted = plant(
            self.tokenizer,
            self.texts,
            tasks=[task],
            documents=self.documents,
            questions=self.per_document,
            context=self.context - len(opening(self.tokenizer)),
            seed=self.seed,
        )
        for number, one in enumerate(planted):
            if not one.questions:
                raise ConfigError(f"--context {self.context}: too short to ask anything of task {task}")
            record = {"answers": [asked.answer for asked in one.questions]}
            hidden = {"questions": [asked.question for asked in one.questions]}
            yield Sample(str(number), one.document, record, hidden)

    def predict(self, subject: Subject, task: str, sample: Sample) -> dict[str, Any]:
        pairs = zip(sample.hidden["questions"], sample.record["answers"], strict=True)
        asked = tuple(synthetic.Question(task, question, answer) for question, answer in pairs)
        case = Case.of(synthetic.Sample((sample.prompt,), asked), self.tokenizer)
        prompt, tails = case.excerpt.prompt, case.excerpt.tails
        cache = new_cache(subject)
        prefill(subject.model, cache, prompt, len(tails))
        best_BL = decode_tails(subject.model, cache, tails)
        found = [answer.is_in(best_L) for answer, best_L in zip(case.answers, best_BL, strict=True)]
        return {"found": found, "prompt_tokens": len(prompt), "new_tokens": best_BL.shape[1]}


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Of each document, the share of questions answered right."""
    return [sum(one["found"]) / len(one["answers"]) for one in records]


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    check_context(args.model, args.context)
    benchmark = Planted(
        load_tokenizer(args.model),
        read_texts(args.data),
        [name.strip() for name in args.tasks.split(",")],
        questions=args.questions,
        per_document=args.per_document,
        context=args.context,
        seed=args.seed,
    )
    return conclude(run(benchmark, plan), sample_scores, folder_table)


def folder_table(folder: RunFolder) -> str:
    """A run's shares of right answers in percent."""
    return means_table(folder, mean_scores(folder, sample_scores), "right, %")
