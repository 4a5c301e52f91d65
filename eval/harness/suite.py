"""``attnpred eval several``: benchmarks one after another, in one process that loads the model once."""

from __future__ import annotations

import argparse
import importlib
import time

from transformers import PreTrainedModel

from attention_predictor.eval.harness.processes import Processes
from attention_predictor.loading import load_model


class LastModel:
    """Loads models and keeps the last one for reuse."""

    def __init__(self) -> None:
        self._asked: tuple[object, ...] | None = None
        self._model: PreTrainedModel | None = None

    def __call__(
        self, name: str, device: str, dtype: str, ranks: int = 1, device_map: str | None = None
    ) -> PreTrainedModel:
        asked = (name, device, dtype, ranks, device_map)
        if self._model is None or self._asked != asked:
            self._model = None  # freed before the next model is loaded
            self._asked, self._model = asked, load_model(*asked)
        return self._model


def main(args: argparse.Namespace) -> int:
    load, codes, is_main = LastModel(), [], Processes().is_main
    begun = time.perf_counter()
    for one in args.benchmarks:
        if is_main:
            print(f"{one.subcommand}, {one.out}", flush=True)
        one.load, started = load, time.perf_counter()
        codes.append(importlib.import_module(one.implementation).main(one) or 0)
        if is_main:
            took, so_far = time.perf_counter() - started, time.perf_counter() - begun
            print(f"{one.subcommand}: {took / 60:.1f} minutes, {so_far / 60:.1f} so far\n", flush=True)
    return max(codes)
