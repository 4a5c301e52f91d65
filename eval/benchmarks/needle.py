"""``attnpred eval needle``: needle in a haystack, by depth and length."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from attention_predictor.arguments import whole_numbers
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.fixed_length import FixedLengthBenchmark, paragraph_end
from attention_predictor.eval.benchmarks.haystack import Draft, Haystack
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.benchmarks.synthetic.documents import read_texts
from attention_predictor.eval.display.heatmap import Axes, HeatMaps, Panel
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.prompts import context_length
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, run
from attention_predictor.eval.harness.scores import show_results
from attention_predictor.loading import load_tokenizer
from attention_predictor.reading import check_unicode, read_lines

KINDS = ("kv", "facts")  # tasks of synthetic.py that one statement is enough for
TASK = "Read the text. Then answer the question behind it, in a few words, from what the text says.\n\n"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Needle:
    """A statement, the question about it, and its answers, any of which is right."""

    kind: str
    statement: str
    question: str
    answers: tuple[str, ...]

    @classmethod
    def make(cls, kind: str, rng: random.Random) -> Needle:
        """One of a kind of ``KINDS``."""
        while True:
            made = synthetic.build(rng, [], {kind: 1}, length=1 << 20, count=len, questions=1, split="eval")
            if len(made.segments) == 1:  # a person's town and trade are two statements at times
                (asked,) = made.questions
                question = asked.question.removeprefix("Question: ").removesuffix("\nAnswer:")
                return cls(kind, made.segments[0].strip(), question, (asked.answer.strip(),))


class NeedleTest(FixedLengthBenchmark):
    """The grid: a task for each length, ``samples`` needles at each depth.

    Args:
        haystack: Text to hide needles in.
        lengths: Tokens of prompt and answer.
        depths: Depths in percent.
        needles: Needles to cycle through; without any, needles are generated.
    """

    name = "needle"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        haystack: Haystack,
        lengths: Sequence[int],
        depths: Sequence[int],
        *,
        samples: int = 1,
        needles: Sequence[Needle] = (),
        chat: bool = True,
        context: int | None = None,
        seed: int = 0,
    ) -> None:
        if bad := [depth for depth in depths if not 0 <= depth <= 100]:
            raise ConfigError(f"--depths {bad[0]}: expected percentages, from 0 to 100")
        for option, given in (("--depths", depths), ("--lengths", lengths)):
            if len(set(given)) < len(given):
                raise ConfigError(f"{option} {','.join(map(str, given))}: a value is given twice")
        super().__init__(tokenizer, chat=chat, context=context, count=samples * len(depths), seed=seed)
        self.tasks = tuple(map(str, lengths))
        self.haystack, self.depths, self.needles = haystack, tuple(depths), tuple(needles)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"depths": self.depths, "haystack": self.haystack.sha256}

    def length(self, task: str) -> int:
        return int(task)

    def new_tokens(self, task: str) -> int:
        return NEW_TOKENS

    def stop(self) -> Sequence[int]:
        """Where a model only goes on with a text, a paragraph's end ends the answer."""
        return () if self.chat else paragraph_end(self.tokenizer)

    def draft(self, task: str, number: int, rng: random.Random) -> Draft:
        repeat, place = divmod(number, len(self.depths))
        depth, start = self.depths[place], self.haystack.start(rng)
        if self.needles:
            needle = self.needles[number % len(self.needles)]
        else:
            needle = Needle.make(KINDS[(repeat + place) % len(KINDS)], rng)
        asked = f"\n\nQuestion: {needle.question}"

        def fill(words: int) -> str:
            text = self.haystack.bury(start, words, [(depth / 100, needle.statement)])
            return (TASK if self.chat else "") + text + asked

        return Draft(needle.answers, fill, "\nAnswer:", record={"depth": depth, "kind": needle.kind})


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """1 where the prediction contains one of the answers, else 0."""
    return [
        0.0 if "error" in one else float(any(contains(one["pred"], it) for it in one["answers"])) for one in records
    ]


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands in the text: whatever the case, and not within a longer word or number."""
    wanted = re.escape(answer.strip().casefold())
    return re.search(rf"(?<![0-9a-z]){wanted}(?![0-9a-z])", text.casefold()) is not None


def read_needles(path: Path | None) -> list[Needle]:
    """Needles of a jsonl file; ``DataError`` names file, line and field."""
    needles = []
    for number, row in read_lines(path) if path is not None else ():
        where = f"{path}, line {number}"
        for name in ("needle", "question"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(f"{where}: expected a text in {name!r}; found fields {', '.join(row)}")
            check_unicode(row[name], where)
        answers = [row["answer"]] if isinstance(row.get("answer"), str) else row.get("answer")
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise DataError(f"{where}: expected a text, or a list of them, in 'answer'; found {answers!r:.40}")
        if not all(one.strip() for one in answers):
            raise DataError(f"{where}: 'answer' is empty, so every prediction would contain it")
        needles.append(Needle("given", row["needle"].strip(), row["question"].strip(), tuple(answers)))
    if path is not None and not needles:
        raise DataError(f"{path}: no needles in it")
    return needles


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    benchmark = NeedleTest(
        load_tokenizer(args.model),
        Haystack(read_texts(args.data)),
        whole_numbers("--lengths", args.lengths),
        whole_numbers("--depths", args.depths, least=0),
        samples=args.samples,
        needles=read_needles(args.needles),
        chat=args.chat,
        context=context_length(args.model),
        seed=args.seed,
    )
    return show_results(run(benchmark, plan), MEASURE, plot=args.plot)


def grid(folder: RunFolder, variant: str) -> list[list[float | None]]:
    """Share of needles found, a row for each depth and a column for each length, the short ones first.

    ``None`` where none is done.
    """
    by_place: dict[tuple[int, str], list[float]] = {}
    for task in folder.tasks:
        records = folder.records(variant, task)
        for record, score in zip(records, sample_scores(task, records), strict=True):
            by_place.setdefault((record["depth"], task), []).append(score)
    return [
        [fmean(found) if (found := by_place.get((depth, task))) else None for task in sorted(folder.tasks, key=int)]
        for depth in folder.description["settings"]["depths"]
    ]


def heat_maps(folder: RunFolder) -> HeatMaps:
    """The grid of every variant."""
    rows = [f"{depth} %" for depth in folder.description["settings"]["depths"]]
    axes = Axes(rows, sorted(folder.tasks, key=int), row_title="depth", column_title="length, tokens")
    panels = [Panel(variant, grid(folder, variant)) for variant in folder.variants]
    return HeatMaps("Needles found, by depth and length", panels, axes)


MEASURE = Measure("Needle in a haystack", "found, %", sample_scores, heat_maps=heat_maps)
