"""Judge selection rules: answers found, and attention mass recovered, when question and answer are decoded sparsely.

The document is prefilled; the question and its answer are then decoded token by token under each rule, so that the
model must find its own evidence. Answers are right when greedy decoding would give every token of them. Recovery is the
share of true attention mass on the attended blocks, relative recovery its ratio to the best selection of that size.

examples:
  attnpred eval recovery --data texts/ --tasks kv,facts --questions 100 --budgets 256,512 \\
      --rule full --rule streaming --rule quest --rule predictor,late_fetch=0 --rule predictor --out table.json
  attnpred eval recovery --data texts/ --rule "paper: predictor,predictor=runs/paper,calibration=exact,late_fetch=0"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from attention_predictor.arguments import add_model_arguments, whole_numbers
from attention_predictor.eval import synthetic
from attention_predictor.eval.tasks import plant, read_texts
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.attach import attach
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.predictor.errors import ConfigError

STOCK = "full"  # as a rule: the stock model with its whole cache


@dataclass(frozen=True)
class Rule:
    """A named way to select: what differs from the default ``OffloadConfig``."""

    name: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``[name:] policy[,field=value…]``."""
        name, _, rest = text.rpartition(":")
        policy, *pairs = (part.strip() for part in rest.split(","))
        types = {one.name: type(getattr(OffloadConfig(), one.name)) for one in fields(OffloadConfig)}
        settings: dict[str, Any] = {"policy": policy}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in types:
                raise ConfigError(f"--rule {text!r}: unknown field {key!r}, expected one of {', '.join(types)}")
            try:
                settings[key] = types[key](value)
            except ValueError as error:
                raise ConfigError(f"--rule {text!r}: {key}={value!r} is not of type {types[key].__name__}") from error
        return cls(name.strip() or rest.strip(), settings)


@dataclass
class Cell:
    """One rule at one budget.

    ``found`` counts right answers of ``asked``; the rest are means over steps, ``None`` where not measured.
    """

    rule: str
    budget: int
    asked: int = 0
    found: int = 0
    recovery: float | None = None
    relative_recovery: float | None = None
    hit_rate: float | None = None
    reuse_rate: float | None = None
    fetched_bytes_per_token: float | None = None
    by_task: dict[str, list[int]] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.found / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy."""
        n, p, z = max(self.asked, 1), self.accuracy, 1.96
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        spread = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(middle - spread, 0.0), min(middle + spread, 1.0)


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[synthetic.Sample],
    rule: Rule,
    budget: int,
    *,
    measure_recovery: int = 0,
    progress: tqdm | None = None,
) -> Cell:
    """Decode every question of every sample under ``rule``; all questions of a document run as one batch."""
    cell = Cell(rule.name, budget)
    if rule.settings == {"policy": STOCK}:
        for sample in samples:
            _ask(model, tokenizer, sample, DynamicCache(config=model.config.get_text_config(decoder=True)), cell)
            if progress is not None:
                progress.update()
        return cell
    config = OffloadConfig(**({"budget": budget, "measure_recovery": measure_recovery} | rule.settings))
    with attach(model, config) as engine:
        for sample in samples:
            _ask(model, tokenizer, sample, engine.new_cache(), cell)
            if progress is not None:
                progress.update()
        stats = engine.stats
    cell.recovery, cell.relative_recovery = stats.recovery, stats.relative_recovery
    cell.hit_rate, cell.reuse_rate = stats.hit_rate, stats.reuse_rate
    # `steps` counts one for the whole batch of a document's questions; bytes are of all its sequences.
    sequences = cell.asked / len(samples)
    cell.fetched_bytes_per_token = stats.fetched_bytes / max(stats.steps * sequences, 1)
    return cell


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: synthetic.Sample,
    cache: Cache,
    cell: Cell,
) -> None:
    """All questions of a document, as a batch of sequences that share its prefill."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    asked = [(encode(one.question), encode(one.answer + synthetic.BREAK)) for one in sample.questions]
    if not asked:
        return
    steps = max(len(question) + len(answer) for question, answer in asked)
    streams = []
    for number in range(len(asked)):
        # Behind its own answer a sequence goes on with other questions, so that every step of the batch is a
        # question-and-answer step and counts for recovery; only its own answer counts as found.
        stream: list[int] = []
        for question, answer in asked[number:] + asked[:number]:
            stream += question + answer
        streams.append(stream[:steps])
    tokens_BL = torch.tensor(streams, device=model.device)
    document = torch.tensor([tokenizer(sample.document, verbose=False)["input_ids"]], device=model.device)
    model(document, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(len(asked))
    predicted = [
        model(tokens_BL[:, step : step + 1], past_key_values=cache).logits[:, -1].argmax(-1)
        for step in range(tokens_BL.shape[1])
    ]
    predicted_BL = torch.stack(predicted, 1)
    for number, (question, answer) in enumerate(asked):
        right = _continues(predicted_BL[number], len(question), answer)
        task = sample.questions[number].task
        counts = cell.by_task.setdefault(task, [0, 0])
        counts[0] += right
        counts[1] += 1
        cell.found += right
        cell.asked += 1


def _continues(predicted_L: Tensor, start: int, answer: Sequence[int]) -> bool:
    """Whether the tokens predicted after the question, each from the right ones before it, are the answer."""
    return predicted_L[start - 1 : start - 1 + len(answer)].tolist() == list(answer)


def markdown(cells: Sequence[Cell]) -> str:
    """Rules by budgets: accuracy with its interval, recovery, relative recovery."""
    budgets = sorted({cell.budget for cell in cells})
    head = "| rule | " + " | ".join(f"budget {budget}: found, recovery, relative" for budget in budgets) + " |"
    lines = [head, "|---" * (len(budgets) + 1) + "|"]
    for name in dict.fromkeys(cell.rule for cell in cells):
        row = []
        for budget in budgets:
            cell = next((one for one in cells if one.rule == name and one.budget == budget), None)
            if cell is None:
                row.append("")
                continue
            low, high = cell.interval
            text = f"{cell.accuracy:.3f} [{low:.2f}, {high:.2f}]"
            if cell.recovery is not None and cell.relative_recovery is not None:
                text += f", {cell.recovery:.3f}, {cell.relative_recovery:.3f}"
            row.append(text)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="text to plant in: .txt file or directory"
    )
    parser.add_argument("--tasks", default="kv,facts", help=f"of {','.join(synthetic.TASKS)} (%(default)s)")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--per-document", type=int, default=20, metavar="N", help="questions a document (%(default)s)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of document and question")
    parser.add_argument("--budgets", default="256,512", metavar="N,N", help="default %(default)s")
    parser.add_argument(
        "--rule", action="append", metavar="RULE", help="[name:] policy[,field=value…]; default: full and predictor"
    )
    parser.add_argument("--recovery", type=int, default=0, metavar="N", help="measure it at every N-th step (0: never)")
    parser.add_argument(
        "--out", type=Path, metavar="F", help="JSON of all cells, written after each; done cells are kept"
    )


def main(args: argparse.Namespace) -> int:
    rules = [Rule.parse(text) for text in args.rule or ["full", "predictor"]]
    budgets = whole_numbers("--budgets", args.budgets)
    for rule in rules:
        for budget in budgets:
            OffloadConfig(**({"budget": budget} | rule.settings))  # refuse bad settings before anything runs
    texts = read_texts(args.data)
    tokenizer = load_tokenizer(args.model)
    samples = plant(
        tokenizer,
        texts,
        tasks=args.tasks.split(","),
        documents=-(-args.questions // args.per_document),
        questions=args.per_document,
        context=args.context,
        seed=args.seed,
    )
    model = load_model(args.model, args.device, args.dtype)
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("run", "out", "rule", "budgets")}
    cells = _load(args.out, settings)
    for budget in budgets:
        for rule in rules:
            if any(cell.rule == rule.name and cell.budget == budget for cell in cells):
                continue
            with tqdm(total=len(samples), desc=f"{rule.name}, budget {budget}", unit="doc", disable=None) as progress:
                cell = judge(model, tokenizer, samples, rule, budget, measure_recovery=args.recovery, progress=progress)
            cells.append(cell)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                draft = {"settings": settings, "cells": [asdict(one) for one in cells]}
                temporary = args.out.with_suffix(".tmp")
                temporary.write_text(json.dumps(draft, indent=1))
                temporary.replace(args.out)
    print(markdown(cells))
    return 0


def _load(path: Path | None, settings: dict[str, str]) -> list[Cell]:
    """Cells of an earlier run with the same settings."""
    if path is None or not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        cells = [Cell(**one) for one in saved["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--out {path} is not a table of this command: {error}") from error
    if saved["settings"] != settings:
        differing = [key for key in settings if saved["settings"].get(key) != settings[key]]
        raise ConfigError(f"--out {path} holds a table of other settings ({', '.join(differing)}): choose another file")
    return cells
