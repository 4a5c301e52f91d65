"""The launcher that started this process among others: ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

from attention_predictor.errors import AttentionPredictorError, ConfigError, one_line

INTERRUPTED = 130
STORE_WAIT = timedelta(seconds=5)
FAILED = "failed processes"  # their number, in the launcher's store
OUT_OF_MEMORY = "OutOfMemoryError"  # of torch, which is not imported for a name
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")  # of torch.distributed


_EXPECTED = "a launcher, such as torchrun, sets it for every process"


def _whole_number(name: str, default: int | None, *, at_least: int = 0, below: int | None = None) -> int:
    """An environment variable's number; ``ConfigError`` if it has none and no default, or one that is not allowed."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ConfigError(f"{name} is not set, but WORLD_SIZE={os.environ.get('WORLD_SIZE')}: {_EXPECTED}")
    number = int(text) if text.isdecimal() else -1
    if number < at_least or (below is not None and number >= below):
        allowed = f"{at_least} or more" if below is None else f"a number from {at_least} to {below - 1}"
        raise ConfigError(f"{name}={text!r} is not allowed: expected {allowed}; {_EXPECTED}")
    return number


class Launcher:
    """This process among those of a launcher; a single process without one.

    Attributes:
        rank, count: This process's number, from 0 on, and how many there are.
        local_rank: Its number on this machine.

    Raises:
        ConfigError: The environment is not that of a launcher; it names the variable.
    """

    def __init__(self) -> None:
        self.count, self.rank, self.local_rank = _whole_number("WORLD_SIZE", 1, at_least=1), 0, 0
        if self.count > 1:
            self.rank = _whole_number("RANK", None, below=self.count)
            self.local_rank = _whole_number("LOCAL_RANK", self.rank, below=self.count)
            if not os.environ.get("MASTER_ADDR"):
                raise ConfigError(f"MASTER_ADDR is not set, but WORLD_SIZE={self.count}: {_EXPECTED}")
            _whole_number("MASTER_PORT", None, below=1 << 16)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device this process uses for ``--device name``.

        With more processes than GPUs, processes share GPUs round-robin.
        """
        import torch

        if self.count == 1 or name != "cuda":
            return name
        return f"cuda:{self.local_rank % max(torch.cuda.device_count(), 1)}"

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Within it, the processes look like one: the first one prints, and the first to fail says why.

        One that fails ends, so that the launcher ends the others, which wait for it.
        """
        if self.count == 1:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            try:
                with redirect_stdout(sys.stdout if self.is_main else nowhere):
                    yield
            except (Exception, KeyboardInterrupt) as error:
                if not self._is_first():
                    raise SystemExit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None
                if type(error).__name__ == OUT_OF_MEMORY:
                    raise AttentionPredictorError(f"process {self.rank} of {self.count}: {one_line(error)}") from error
                if isinstance(error, RuntimeError) and any(part in str(error) for part in PEER_ENDED):
                    raise AttentionPredictorError(
                        "another process of this run has ended without a word: see what the launcher says of it"
                    ) from error
                raise

    def _is_first(self) -> bool:
        """Whether no other process has failed before, by a counter in the launcher's store."""
        import torch.distributed as dist

        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=STORE_WAIT))
            failed = int(store.add(FAILED, 1))
            if self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                # This process keeps the store: the others must be able to ask it.
                until = time.monotonic() + STORE_WAIT.total_seconds()
                while store.add(FAILED, 0) < self.count and time.monotonic() < until:
                    time.sleep(0.05)
            return failed == 1
        except (RuntimeError, ValueError):  # the store has ended with the process that kept it
            return True  # rather said twice than never
