"""LongBench as a benchmark of the runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from attention_predictor.documents import encode
from attention_predictor.eval.benchmarks.longbench.data import SUFFIX, Rows, make_sample, template_fields
from attention_predictor.eval.benchmarks.longbench.tasks import BENCHMARK, TASKS
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.prompts import check_chat, fitted_ids
from attention_predictor.eval.harness.runner import KEPT_SAMPLES, Benchmark, Sample
from attention_predictor.reading import check_unicode


class LongBench(Benchmark):
    """LongBench or LongBench-E, as its authors run it.

    Args:
        rows: Where samples come from (``data.open_source``).
        extended: LongBench-E.
        chat: Put prompts into the chat template, but those of tasks that are examples or code to go on with.
        max_length: Tokens of a prompt before the template; longer ones lose their middle. ``None`` for what the model
            has positions for, less the answer's.
        templates: Replacements of official templates, by task.
        answer_likelihood: Also record how likely the first reference answer is, decoded under the policy.

    Raises:
        ConfigError: The tokenizer has no chat template though one is needed, or a template is none.
    """

    name = BENCHMARK

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        tasks: Sequence[str],
        *,
        extended: bool = False,
        chat: bool = True,
        max_length: int | None = None,
        templates: Mapping[str, str] | None = None,
        answer_likelihood: bool = False,
    ) -> None:
        self.tokenizer, self.rows, self.tasks = tokenizer, rows, tuple(tasks)
        self.extended, self.chat, self.max_length = extended, chat, max_length
        self.templates = {task: (templates or {}).get(task, TASKS[task].template) for task in tasks}
        self.answer_likelihood = answer_likelihood
        self._kept: dict[tuple[str, str, int | None], tuple[list[int], bool]] = {}
        for template in self.templates.values():
            template_fields(template)
        if needing := [task for task in tasks if chat and TASKS[task].chat]:
            check_chat(tokenizer, f"{needing[0]} needs one; --no-chat gives prompts as they are")

    def settings(self) -> dict[str, Any]:
        return {
            "extended": self.extended,
            "chat": self.chat,
            "max_length": self.max_length,
            "answer_likelihood": self.answer_likelihood,
        }

    def samples(self, task: str) -> Iterator[Sample]:
        for number, (where, row) in enumerate(self.rows(task + SUFFIX if self.extended else task)):
            sample = make_sample(row, where, number, task, self.templates[task])
            if self.answer_likelihood:
                check_unicode(sample.record["answers"][0], f"{where}, 'answers'")
            yield sample

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        what = TASKS[task]
        prompt, cut = self.prompt_ids(task, sample, evaluated.context)
        options: dict[str, Any] = {}
        if what.stops_at_newline:
            options = {"stop": encode(self.tokenizer, "\n")[-1:], "min_new_tokens": 1}
        if self.answer_likelihood:
            options["judge"] = self.answer_ids(task, sample)
        return evaluated.predict(self.tokenizer, prompt, what.max_new_tokens, **options) | {"truncated": cut}

    def prompt_ids(self, task: str, sample: Sample, context: int | None) -> tuple[list[int], bool]:
        """``fitted_ids`` of a prompt, with room for the answer within ``context`` tokens, if there is such a limit.

        Those of few samples are kept for all variants, since a book takes a while.
        """
        key = (task, sample.id, context)
        if (known := self._kept.get(key)) is not None:
            return known
        room = None if context is None else context - TASKS[task].max_new_tokens
        chat = self._asks_in_chat(task)
        found = fitted_ids(self.tokenizer, sample.prompt, chat=chat, longest=self.max_length, room=room)
        if len(self._kept) < KEPT_SAMPLES:
            self._kept[key] = found
        return found

    def answer_ids(self, task: str, sample: Sample) -> list[int]:
        """Token ids of the first reference answer behind its prompt, no more of it than the model may generate."""
        follows_blank = self._asks_in_chat(task) or TASKS[task].chinese or sample.prompt[-1:].isspace()
        answer = encode(self.tokenizer, ("" if follows_blank else " ") + sample.record["answers"][0])
        return answer[: TASKS[task].max_new_tokens]

    def _asks_in_chat(self, task: str) -> bool:
        return self.chat and TASKS[task].chat
