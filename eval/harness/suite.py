"""``attnpred eval several``: benchmarks one after another, in one process that loads the model once."""

from __future__ import annotations

import argparse
import importlib
import time
from contextlib import redirect_stdout
from io import StringIO

from transformers import PreTrainedModel

from attention_predictor.commands.eval.several import naming
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
    with redirect_stdout(StringIO()):  # what this prints comes again
        for one in args.benchmarks:
            with naming(one):
                _main_of(one, check_only=True)
    begun = time.perf_counter()
    for one in args.benchmarks:
        if is_main:
            print(f"{one.subcommand}, {one.out}", flush=True)
        started = time.perf_counter()
        codes.append(_main_of(one, load=load))
        if is_main:
            took, so_far = time.perf_counter() - started, time.perf_counter() - begun
            print(f"{one.subcommand}: {took / 60:.1f} minutes, {so_far / 60:.1f} so far\n", flush=True)
    return max(codes)


def _main_of(args: argparse.Namespace, **further: object) -> int:
    """Runs a benchmark's command; its options stay as they are."""
    return importlib.import_module(args.implementation).main(argparse.Namespace(**(vars(args) | further)))
