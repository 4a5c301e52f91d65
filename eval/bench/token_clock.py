"""TokenClock: times the tokens of any loop that calls a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attention_predictor.eval.bench.device import wait


class TokenClock:
    """Times the model's one-token forwards within the ``with`` block.

    Before the steps numbered in ``marks`` (the first is 0) it waits for the device and takes the time; between them the
    host may run ahead as far as the loop lets it. Leaving it waits once more.
    """

    def __init__(self, model: PreTrainedModel, marks: Sequence[int]) -> None:
        self._model, self._marks = model, frozenset(marks)
        self._times: dict[int, float] = {}
        self.steps = 0

    def __enter__(self) -> TokenClock:
        self._hook = self._model.register_forward_pre_hook(self._look, with_kwargs=True)
        wait(self._model.device)
        self._begun = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        wait(self._model.device)
        self._ended = time.perf_counter()

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or ids.shape[1] != 1:
            return
        if self.steps in self._marks:
            wait(self._model.device)
            self._times[self.steps] = time.perf_counter()
        self.steps += 1

    def ms_before(self, mark: int) -> float:
        """Milliseconds from the beginning to the step of this number."""
        return 1000 * (self._times[mark] - self._begun)

    def ms_per_token(self, mark: int) -> float:
        """Milliseconds a step, from the one of this number on."""
        return 1000 * (self._ended - self._times[mark]) / (self.steps - mark)
