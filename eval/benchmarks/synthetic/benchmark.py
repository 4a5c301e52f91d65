"""``attnpred eval synthetic``: the pocket model's own tasks (``tasks.py``), answers found in documents."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from attention_predictor.arithmetic import ceil_div
from attention_predictor.documents import Excerpt, encode, opening
from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.benchmarks.synthetic.documents import plant, read_texts
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.prompts import check_context
from attention_predictor.eval.harness.runner import Benchmark, Plan, Sample, run
from attention_predictor.eval.harness.scores import show_results
from attention_predictor.eval.harness.teacher_forcing import decode_tails, prefill
from attention_predictor.loading import load_tokenizer

MIXED = "+"  # joins tasks of one mixed benchmark task; its documents alternate between them


class SyntheticBenchmark(Benchmark):
    """Documents with planted statements; a sample is a document with all its questions.

    Args:
        texts: Texts to plant in, by name.
        tasks: Names of ``synthetic.TASKS``; ``"kv+facts"`` is one task whose documents alternate between both.
        questions: Questions of each task, rounded up to whole documents.
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
        synthetic.check_tasks([name for task in tasks for name in task.split(MIXED)])
        for option, value in (("--questions", questions), ("--per-document", per_document)):
            if value < 1:
                raise ConfigError(f"{option} {value}: expected at least 1")
        self.tokenizer, self.texts, self.tasks = tokenizer, texts, tuple(tasks)
        self.documents, self.per_document = ceil_div(questions, per_document), per_document
        self.context, self.seed = context, seed

    def settings(self) -> dict[str, Any]:
        return {"per_document": self.per_document, "context": self.context}

    def samples(self, task: str) -> Iterator[Sample]:
        planted = plant(
            self.tokenizer,
            self.texts,
            tasks=task.split(MIXED),
            documents=self.documents,
            questions=self.per_document,
            context=self.context - len(opening(self.tokenizer)),
            seed=self.seed,
        )
        for number, one in enumerate(planted):
            if not one.questions:
                raise ConfigError(f"--context {self.context}: too short for a question of task {task}")
            record: dict[str, Any] = {"answers": [asked.answer for asked in one.questions]}
            if MIXED in task:
                record["task"] = one.questions[0].task
            hidden = {"questions": [asked.question for asked in one.questions]}
            yield Sample(str(number), one.document, record, hidden)

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        pairs = zip(sample.hidden["questions"], sample.record["answers"], strict=True)
        asked = tuple(synthetic.Question(task, question, answer) for question, answer in pairs)
        return find_answers(evaluated, self.tokenizer, synthetic.Sample((sample.prompt,), asked))


def find_answers(evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, sample: synthetic.Sample) -> Record:
    """Decode all questions and answers of a document after one prefill, each a sequence of the batch.

    After its own answer a sequence continues with other questions, so every step of the batch is a
    question-and-answer step and counts for recovery; only its own answer counts as found.

    Returns:
        ``found``, by question: whether greedy decoding gives every token of the answer; ``prompt_tokens`` and
        ``new_tokens`` (of one sequence).
    """
    questions = [encode(tokenizer, one.question) for one in sample.questions]
    answers = [encode(tokenizer, one.answer + synthetic.BREAK) for one in sample.questions]
    prompt = opening(tokenizer) + encode(tokenizer, sample.document)
    tails = Excerpt.cyclic(prompt, [one + other for one, other in zip(questions, answers, strict=True)]).tails
    cache = evaluated.new_cache()
    prefill(evaluated.model, cache, prompt, len(tails))
    best_BL = decode_tails(evaluated.model, cache, tails)
    found = [
        best_L[len(question) - 1 :][: len(answer)].tolist() == answer
        for question, answer, best_L in zip(questions, answers, best_BL, strict=True)
    ]
    return {"found": found, "prompt_tokens": len(prompt), "new_tokens": best_BL.shape[1]}


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Share of right answers in each document."""
    return [sum(one["found"]) / len(one["answers"]) for one in records]


MEASURE = Measure("Synthetic tasks", "right, %", sample_scores)


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    return show_results(run(make_benchmark(args, SyntheticBenchmark, synthetic.parse_tasks(args.tasks)), plan), MEASURE)


def make_benchmark(
    args: argparse.Namespace, kind: type[SyntheticBenchmark], tasks: Sequence[str]
) -> SyntheticBenchmark:
    """A benchmark of planted questions, as ``attnpred eval synthetic`` and ``eval recovery`` take its options.

    Raises:
        ConfigError: ``--context`` exceeds the model's positions, or another option is not allowed.
        DataError: ``--data`` has no text.
    """
    check_context(args.model, args.context)
    return kind(
        load_tokenizer(args.model),
        read_texts(args.data),
        tasks,
        questions=args.questions,
        per_document=args.per_document,
        context=args.context,
        seed=args.seed,
    )
