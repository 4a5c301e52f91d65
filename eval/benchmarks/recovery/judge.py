"""Judging a selection rule: answers found and attention mass recovered, when what follows a prompt is decoded sparsely.

Suffixes: B sequences, L steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from attention_predictor.documents import Excerpt, encode, opening
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.eval.harness.rules import STOCK as STOCK
from attention_predictor.eval.harness.rules import Rule as Rule
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.versions import with_cache

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Answer:
    """What a tail must contain, from its token ``start`` on, to count as found."""

    task: str
    start: int
    ids: tuple[int, ...]

    def is_in(self, predicted_L: Tensor) -> bool:
        """Whether the tokens predicted, each from the right ones before it, are the answer."""
        return predicted_L[self.start - 1 : self.start - 1 + len(self.ids)].tolist() == list(self.ids)


@dataclass(frozen=True)
class Case:
    """A prompt, the tails decoded behind it, and each tail's answer, if it has one."""

    excerpt: Excerpt
    answers: tuple[Answer, ...] = ()

    @classmethod
    def of(cls, sample: synthetic.Sample, tokenizer: PreTrainedTokenizerBase) -> Case:
        """All questions of a planted document, a tail each.

        Behind its own answer a tail goes on with other questions, so that every step of the batch is a
        question-and-answer step and counts for recovery; only its own answer counts as found.
        """
        asked = [
            (encode(tokenizer, one.question), encode(tokenizer, one.answer + synthetic.BREAK))
            for one in sample.questions
        ]
        answers = (
            Answer(one.task, len(question), tuple(answer))
            for one, (question, answer) in zip(sample.questions, asked, strict=True)
        )
        prompt = opening(tokenizer) + encode(tokenizer, sample.document)
        return cls(Excerpt.cyclic(prompt, [question + answer for question, answer in asked]), tuple(answers))


@dataclass
class Cell:
    """One rule at one budget.

    ``settings`` are those of the rule. ``found`` counts right answers of ``asked``; the rest are means over steps,
    ``None`` where not measured.
    """

    rule: str
    budget: int
    settings: dict[str, Any] = field(default_factory=dict)
    asked: int = 0
    found: int = 0
    recovery: float | None = None
    relative_recovery: float | None = None
    hit_rate: float | None = None
    reuse_rate: float | None = None
    fetched_bytes_per_token: float | None = None
    by_task: dict[str, list[int]] = field(default_factory=dict)
    relative_by_document: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.found / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy."""
        n, p, z = max(self.asked, 1), self.accuracy, Z95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        spread = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(middle - spread, 0.0), min(middle + spread, 1.0)

    @property
    def spread(self) -> float | None:
        """Half the 95% interval of the relative recovery, documents being what varies."""
        n = len(self.relative_by_document)
        return Z95 * stdev(self.relative_by_document) / n**0.5 if n > 1 else None


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    cases: Sequence[Case],
    rule: Rule,
    budget: int,
    *,
    measure_recovery: int = 0,
    after_each: Callable[[], object] = lambda: None,
) -> Cell:
    """Decode every tail of every case under ``rule``; those of a case run as one batch.

    Args:
        measure_recovery: At every n-th step; 0: never.
        after_each: Called after each case.
    """
    cell = Cell(rule.name, budget, rule.settings)
    if rule.settings == {"policy": STOCK}:
        for case in cases:
            _decode(model, case, DynamicCache(config=model.config.get_text_config(decoder=True)), cell)
            after_each()
        return cell
    with attach(model, rule.config(budget, measure_recovery=measure_recovery)) as engine:
        for case in cases:
            stats = engine.stats
            before = stats.relative_recovery_sum, stats.recovery_count
            _decode(model, case, engine.new_cache(), cell)
            stats = engine.stats  # anew: to ask is to count what captured steps have done since
            if stats.recovery_count > before[1]:
                mean = (stats.relative_recovery_sum - before[0]) / (stats.recovery_count - before[1])
                cell.relative_by_document.append(mean)
            after_each()
        stats = engine.stats
    cell.recovery, cell.relative_recovery = stats.recovery, stats.relative_recovery
    cell.hit_rate, cell.reuse_rate = stats.hit_rate, stats.reuse_rate
    # `steps` counts one for the whole batch of a document's tails; bytes are of all its sequences.
    sequences = sum(len(case.excerpt.tails) for case in cases) / len(cases)
    cell.fetched_bytes_per_token = stats.fetched_bytes / max(stats.steps * sequences, 1)
    return cell


def _decode(model: PreTrainedModel, case: Case, cache: Cache, cell: Cell) -> None:
    """All tails of a case, as a batch of sequences that share its prefill."""
    tails_BL = torch.tensor(case.excerpt.tails, device=model.device)
    model(torch.tensor([case.excerpt.prompt], device=model.device), **with_cache(model, cache), logits_to_keep=1)
    cache.batch_repeat_interleave(len(tails_BL))
    predicted = [
        model(token_B1, **with_cache(model, cache)).logits[:, -1].argmax(-1) for token_B1 in tails_BL.split(1, dim=1)
    ]
    for answer, predicted_L in zip(case.answers, torch.stack(predicted, 1), strict=False):  # or no answers at all
        right = answer.is_in(predicted_L)
        counts = cell.by_task.setdefault(answer.task, [0, 0])
        counts[0] += right
        counts[1] += 1
        cell.found += right
        cell.asked += 1


def markdown(cells: Sequence[Cell]) -> str:
    """Rules by budgets: what was asked and measured."""
    budgets = sorted({cell.budget for cell in cells})
    asked = any(cell.asked for cell in cells)
    titles = (["found [95% interval]"] if asked else []) + ["recovery", "relative ± half its 95% interval"]
    head = "| rule | " + " | ".join(f"budget {budget}: {', '.join(titles)}" for budget in budgets) + " |"
    lines = [head, "|---" * (len(budgets) + 1) + "|"]
    by_place = {(cell.rule, cell.budget): cell for cell in cells}
    for name in dict.fromkeys(cell.rule for cell in cells):
        row = [_words(by_place[name, budget]) if (name, budget) in by_place else "" for budget in budgets]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _words(cell: Cell) -> str:
    low, high = cell.interval
    parts = [f"{cell.accuracy:.3f} [{low:.2f}, {high:.2f}]"] if cell.asked else []
    if cell.recovery is not None and cell.relative_recovery is not None:
        spread = f" ± {cell.spread:.3f}" if cell.spread is not None else ""
        parts += [f"{cell.recovery:.3f}", f"{cell.relative_recovery:.3f}{spread}"]
    return ", ".join(parts)
