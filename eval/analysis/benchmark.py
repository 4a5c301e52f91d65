"""The analysis as a benchmark of the runner: a document is a sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attention_predictor.documents import Excerpt
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.analysis.document import AnalysisSettings, analyse
from attention_predictor.eval.harness.evaluated_model import EvaluatedModel
from attention_predictor.eval.harness.runner import Sample
from attention_predictor.eval.harness.windows import WindowBenchmark, Windows
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.predictor.base import AttentionPredictor

VARIANT = "attention"  # attends to everything, from host memory
PREDICTORS = ("predictor", "last")  # names in columns; ``last`` repeats the last row


class Analysis(WindowBenchmark):
    """Documents; the attention maps of each are classified.

    Args:
        windows: Prompts and what follows them.
        tails: At most this many continuations of a row.
        window: Tokens over which query similarity is taken.
        predictor: Whose foresight is measured: a name or a directory.
        selection: Budget, sink and recent tokens of its choices.
    """

    name = "analyze"

    def __init__(self, windows: Windows, *, tails: int, window: int, predictor: str, selection: Selection) -> None:
        if window < 2:
            raise ConfigError(f"--window {window}: expected at least 2 queries, to make a pair")
        if tails < 1:
            raise ConfigError(f"--tails {tails}: expected at least 1")
        if windows.tail < 2:
            raise ConfigError(f"--tail {windows.tail}: expected at least 2 steps, to compare")
        super().__init__(windows)
        self.tails, self.window, self.predictor, self.selection = tails, window, predictor, selection
        size = selection.block_size
        self._predictors = {
            name: AttentionPredictor.from_pretrained(what, block_size=size)
            for name, what in zip(PREDICTORS, (predictor, "last"), strict=True)
        }

    def settings(self) -> dict[str, Any]:
        own = {"tails": self.tails, "window": self.window, "predictor": self.predictor}
        return super().settings() | own | {"budget": self.selection.budget}

    def samples(self, task: str) -> Iterator[Sample]:
        for one in super().samples(task):
            prompt, tails = one.hidden["prompt"], one.hidden["tails"]
            if len(prompt) > self._least and len(tails[0]) > 1:
                yield replace(one, hidden={"prompt": prompt, "tails": tails[: self.tails]})

    def check(self, task: str, limit: int | None) -> dict[str, Any]:
        if next(self.samples(task), None) is None:
            size = f"{self.windows.context} tokens (--context), rows with continuations {self._least + 1} of a prompt"
            raise DataError(f"--data {task}: no document is long enough: text needs {size}")
        return super().check(task, limit)

    @property
    def _least(self) -> int:
        """A prompt must be longer: below the budget every block is selected."""
        return max(self.selection.budget, self.window)

    def predict(self, evaluated: EvaluatedModel, task: str, sample: Sample) -> dict[str, Any]:
        assert evaluated.engine is not None  # the variant is not the stock model
        predictors = {name: one.to(evaluated.model.device) for name, one in self._predictors.items()}
        excerpt = Excerpt(**sample.hidden)
        found = analyse(evaluated.engine, excerpt, AnalysisSettings(predictors, self.selection, self.window))
        sizes = {"prompt_tokens": len(excerpt.prompt), "new_tokens": sum(map(len, excerpt.tails))}
        return found | sizes
