"""The GPU's kernels on a CPU, by the emulation in tests/emulation: slow, for their logic alone."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from attention_predictor.csrc import binding, build, ops
from attention_predictor.csrc.kernel import Kernel, program_text
from attention_predictor.offload.blocks import room
from attention_predictor.offload.hf import graph
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.graph import CacheGraph
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.policies.predictor import PredictorPolicy
from attention_predictor.predictor.history import why_no_kernel

HEADERS = Path(__file__).parent / "emulation"


@functools.cache
def libraries() -> dict[str, ctypes.CDLL]:
    """The programs of every CUDA source, with all its kernels, as C++ against the emulation's headers."""
    version = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(HEADERS.iterdir()))).hexdigest()[:16]
    flags = ("-O1", "-U_FORTIFY_SOURCE", f"-I{HEADERS}", f"-DEMULATION={version!r}")
    programs: dict[str, list[Kernel]] = {}
    for kernel in ops.every_kernel():
        programs.setdefault(kernel.source, []).append(kernel)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: build.cpu_library(item[0], program_text(item[1]), flags), programs.items())
        return dict(zip(programs, found, strict=True))


def launch(
    kernel: Kernel,
    device: torch.device,
    grid: tuple[int, int, int],
    arguments: ctypes.Structure,
    *,
    threads: int | None = None,
    shared_bytes: int = 0,
) -> None:
    """As ``Kernel.launch``; a kernel that ``every_kernel`` leaves out is an error."""
    assert isinstance(arguments, kernel.struct)
    if 0 not in grid:
        run = getattr(libraries()[kernel.source], kernel.name)
        shape = ((ctypes.c_uint * 3)(*grid), threads or kernel.threads, ctypes.c_size_t(shared_bytes))
        run(ctypes.byref(arguments), *shape)


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Within it, operations on CPU tensors are done by the GPU's kernels."""
    libraries()
    with (
        mock.patch.object(Kernel, "launch", launch),
        mock.patch.object(binding, "on_gpu", return_value=True),
        mock.patch.object(binding, "multiprocessors", return_value=4),
        mock.patch.object(binding, "max_shared_memory", return_value=48 << 10),
    ):
        yield


def emulate_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps on the CPU, by the emulated GPU's kernels; all else as on a CPU."""
    run = CacheGraph.run

    def emulated_run(self: CacheGraph, cache: TieredCache, kwargs: dict[str, Any]) -> object:
        for layer in self.layers:
            layer.blocks.settle()  # the prefetch thread keeps to the CPU's kernels
        histories = [layer.policy.history for layer in self.layers if isinstance(layer.policy, PredictorPolicy)]
        with emulated_gpu():
            for history in histories:
                history.kernel = why_no_kernel(history.predictor, "cpu") is None
            try:
                return run(self, cache, kwargs)
            finally:
                for history in histories:
                    history.kernel = False

    def of_the_policy(cache: TieredCache, cache_graph: CacheGraph | None) -> str | None:
        layer = next(layer for layer in cache.layers if isinstance(layer, TieredLayer))
        return layer.policy.why_never_captured(layer.runtime.config)

    monkeypatch.setattr(CacheGraph, "run", emulated_run)
    monkeypatch.setattr(graph, "why_not_captured", of_the_policy)
    monkeypatch.setattr(room, "GROWTH", 128)
