"""Long generation under a budget, a benchmark of the runner: how far a policy departs from the whole cache, and where.

The stock model first writes a continuation of every prompt, greedily. Each policy then follows that path token by
token. At each position its next token is compared with the stock model's: whether the most likely one is the same, and
the divergence KL(stock ‖ policy) of the two distributions. All policies are compared on the same path, position by
position. Up to the first position with another token, the path is also what the policy writes by itself.

Suffixes: V vocabulary, K most likely tokens, L positions.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention_predictor.errors import AttentionPredictorError, DataError, one_line
from attention_predictor.eval.display.text_table import text_table
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.measure import Measure
from attention_predictor.eval.harness.predictions import Record
from attention_predictor.eval.harness.processes import Processes
from attention_predictor.eval.harness.prompts import check_context
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.runner import Plan, Sample, run
from attention_predictor.eval.harness.scores import mean_scores, notes, show_results
from attention_predictor.eval.harness.windows import WindowBenchmark, Windows, windows_of
from attention_predictor.offload.hf.placement import input_device
from attention_predictor.progress import Progress
from attention_predictor.writing import write_atomically, writing

KEPT = 256  # most likely tokens of each position, whose probabilities are kept; the others count as one
PARTS = 16  # of a continuation, that figures by position are of
FIGURES = ("kl", "agreement", "first_difference")


class Reference(NamedTuple):
    """The stock model's continuation, and its prediction at each position.

    Attributes:
        token_L: int64, the continuation.
        best_L: int64, the most likely token at each position: that of the path, unless it would have ended the text.
        top_LK: int64, the most likely tokens.
        log_LK: fp32, natural logarithms of their probabilities.
    """

    token_L: Tensor
    best_L: Tensor
    top_LK: Tensor
    log_LK: Tensor

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        torch.save({name: tensor.cpu() for name, tensor in self._asdict().items()}, buffer)
        return buffer.getvalue()

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read a file of ``to_bytes``; raises ``DataError`` if it is missing or invalid."""
        try:
            return cls(**torch.load(path, weights_only=True))
        except Exception as error:
            raise DataError(f"{path}: no continuation by the stock model: {one_line(error, 200)}") from error


@torch.no_grad()
def write_reference(subject: EvaluatedModel, prompt: Sequence[int], tokens: int) -> Reference:
    """The model's greedy continuation of so many tokens; it goes on where the model would end."""
    path: list[Tensor] = []
    best: list[Tensor] = []
    top: list[Tensor] = []
    logs: list[Tensor] = []
    # What is written is read as the next token.
    for logits_V in subject.logits(prompt, (path[i] for i in count()), tokens):
        log_V = logits_V.float().log_softmax(-1)
        log_K, top_K = log_V.topk(min(KEPT, len(log_V)))
        going_on_V = log_V.clone()
        going_on_V[subject.ends] = -math.inf
        path.append(going_on_V.argmax())
        best.append(top_K[0])
        top.append(top_K)
        logs.append(log_K)
    return Reference(torch.stack(path), torch.stack(best), torch.stack(top), torch.stack(logs))


@torch.no_grad()
def compare(subject: EvaluatedModel, prompt: Sequence[int], reference: Reference) -> dict[str, Any]:
    """What a record holds: ``FIGURES``, and by part of the continuation.

    - kl: nats a token, mean of KL(stock ‖ subject) over positions. Tokens outside of ``top_LK`` count as one, so that
      it is at most the divergence of the whole distributions.
    - agreement: share of positions with the same most likely token.
    - first_difference: the first position with another one; the number of tokens where there is none.
    """
    device = input_device(subject.model)
    reference = Reference(*(tensor.to(device) for tensor in reference))
    divergences, same = [], []
    for position, logits_V in enumerate(subject.logits(prompt, reference.token_L.unbind(), len(reference.token_L))):
        log_V = logits_V.float().log_softmax(-1)
        divergences.append(_divergence(reference.log_LK[position], log_V[reference.top_LK[position]]))
        same.append(log_V.argmax() == reference.best_L[position])
    kl_L, same_L = torch.stack(divergences).cpu(), torch.stack(same).cpu()
    differing = (~same_L).nonzero()
    return {
        "tokens": len(kl_L),
        "kl": float(kl_L.mean()),
        "agreement": float(same_L.double().mean()),
        "first_difference": int(differing[0]) if len(differing) else len(same_L),
        "kl_by_part": [float(part.mean()) for part in kl_L.tensor_split(PARTS) if len(part)],
        "agreement_by_part": [float(part.double().mean()) for part in same_L.tensor_split(PARTS) if len(part)],
    }


def _divergence(log_p_K: Tensor, log_q_K: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, fp64; of both the K probabilities given, and what they leave as one more."""
    log_p_K, log_q_K = log_p_K.double(), log_q_K.double()
    rest_p, rest_q = ((1 - x.exp().sum()).clamp_min(1e-12) for x in (log_p_K, log_q_K))
    return (log_p_K.exp() * (log_p_K - log_q_K)).sum() + rest_p * (rest_p / rest_q).log()


class Continuation(WindowBenchmark):
    """Beginnings of documents, each a sample: how far what follows departs from the stock model's continuation.

    Args:
        windows: Whose prompts are continued.
        tokens: Of a continuation.
        out: The run's directory, in which ``references/`` has what the stock model wrote.
    """

    name = "continuation"

    def __init__(self, windows: Windows, tokens: int, out: Path) -> None:
        super().__init__(windows)
        self.tokens, self.out = tokens, out

    def settings(self) -> dict[str, Any]:
        return {"context": self.windows.context - 1, "new_tokens": self.tokens, "per_file": self.windows.per_file}

    def prepare(self, stock: EvaluatedModel, samples: Iterable[tuple[str, Sample]], processes: Processes) -> None:
        """Write the continuations that are missing. Where one fails, the sample fails under every policy."""
        every = list(samples)
        paths = [self._reference(task, sample) for task, sample in every]
        if all(path.exists() for path in paths):
            return
        with Progress("continuations", len(every), "samples", quiet=not processes.is_main) as progress:
            for number in processes.numbers(len(every), "continuations"):
                (task, sample), path = every[number], paths[number]
                if not path.exists():
                    with writing(path):
                        path.parent.mkdir(parents=True, exist_ok=True)
                    try:
                        found = write_reference(stock, sample.hidden["prompt"], self.tokens)
                    except (AttentionPredictorError, RuntimeError) as error:  # too long, or out of memory
                        if processes.ranks > 1 and not isinstance(error, AttentionPredictorError):
                            raise  # the others wait for this process: all end
                        reason = f"{type(error).__name__}: {one_line(error, 200)}"
                        print(f"{task} {sample.id}: the stock model generated no continuation: {reason}")
                    else:
                        if processes.writes:
                            write_atomically(path, found.to_bytes())
                progress.reach(number + 1)

    def predict(self, subject: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        prompt = sample.hidden["prompt"]
        reference = Reference.read(self._reference(task, sample))
        return compare(subject, prompt, reference) | {"prompt_tokens": len(prompt)}

    def _reference(self, task: str, sample: Sample) -> Path:
        name = hashlib.sha256(sample.id.encode("utf-8", "backslashreplace")).hexdigest()[:16]  # ids may be any text
        return self.out / "references" / task / f"{name}.pt"


def sample_scores(task: str, records: Sequence[Record]) -> list[float]:
    """Nats a token of each sample; less is better. Not a number where it failed: there is no worst value."""
    return [one["kl"] if "error" not in one else math.nan for one in records]


MEASURE = Measure(
    *("Long generation", "KL, millinats a token, less is better", sample_scores),
    scale=1000.0,
    higher=False,
    bounds=(0.0, math.inf),
    failed="left out of the figures",
)


def main(args: argparse.Namespace) -> int:
    plan = Plan.of(args)
    check_context(args.model, args.context + args.new_tokens)
    # A document needs one token more than its prompt to be one that goes on.
    args.context, args.tail = args.context + 1, 1
    return show_results(run(Continuation(windows_of(args), args.new_tokens, plan.out), plan), MEASURE, folder_table)


def folder_table(folder: RunFolder, measure: Measure) -> str:
    """Variants down; divergence over all samples, by quarter of the continuation, agreement, first difference."""
    rows: list[tuple[object, ...]] = []
    for task in folder.tasks:
        for variant in folder.variants:
            known = [one for one in folder.records(variant, task) if "error" not in one]
            kl, agreement, first = (fmean(one[name] for one in known) if known else None for name in FIGURES)
            quarters = _quarters(known) if known else [None] * 4
            shown = (None if x is None else f"{x:.4f}" for x in (kl, *quarters))
            rows.append((f"{task}: {variant}", *shown, None if agreement is None else 100 * agreement, first))
    titles = ("KL, nats a token", "all", *(f"quarter {i}" for i in range(1, 5)), "same token, %", "first other")
    return text_table(titles, rows, notes(mean_scores(folder, measure), measure.failed))


def _quarters(records: Sequence[Record]) -> list[float | None]:
    """Mean divergence in each quarter of the positions."""
    by_part = [fmean(values) for values in zip(*(one["kl_by_part"] for one in records), strict=True)]
    quarter = math.ceil(len(by_part) / 4)
    parts = [by_part[i * quarter : (i + 1) * quarter] for i in range(4)]
    return [fmean(part) if part else None for part in parts]
