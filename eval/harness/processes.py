"""The processes that share a run, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from attention_predictor.errors import AttentionPredictorError
from attention_predictor.launcher import Launcher

_TIMES = itertools.count()  # joins so far; each join uses its own store prefix
PATIENCE = timedelta(days=7)  # how long finished processes wait for the others


class Processes(Launcher):
    """This process among those of a run. They share its samples, or divide its model and do every sample together.

    Args:
        divide_model: Whether they divide the model (tensor parallelism).

    Attributes:
        ranks: Among how many processes the model is divided.
        writes: Whether this process writes results.
    """

    def __init__(self, *, divide_model: bool = False) -> None:
        super().__init__()
        self.ranks = self.count if divide_model else 1
        self.writes = self.ranks == 1 or self.is_main
        self._group: Any = None
        self._store: Any = None

    def numbers(self, total: int, what: str = "samples") -> Iterator[int]:
        """Numbers below ``total`` in order; each goes to the process that asks first, or to all that divide the model.

        Args:
            what: Names the things that are counted, the same in every process.
        """
        if self.count == 1 or self.ranks > 1:
            return iter(range(total))
        counter = f"taken {what}"
        return iter(lambda: min(self._store.add(counter, 1) - 1, total), total)

    def __enter__(self) -> Processes:
        if self.count > 1:
            store, rank, count = next(dist.rendezvous("env://"))
            self._store = dist.PrefixStore(f"run{next(_TIMES)}", store)
            # A divided model computes with NCCL on GPUs.
            backend = "cpu:gloo,cuda:nccl" if self.ranks > 1 and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.PrefixStore("group", self._store), rank=rank, world_size=count)
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            try:
                dist.barrier(group=self._group)
            except RuntimeError as error:
                raise AttentionPredictorError(
                    "another process of this run has stopped: see its message; run the command again to continue"
                ) from error
