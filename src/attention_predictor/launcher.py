"""The launcher that started this process among others: ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

from attention_predictor.errors import AttentionPredictorError, ConfigError

INTERRUPTED = 130
STORE_WAIT = timedelta(seconds=5)
PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")  # of torch.distributed


class Launcher:
    """This process among those of a launcher; a single process without one.

    Attributes:
        rank, count: This process's number, from 0 on, and how many there are.
        local_rank: Its number on this machine.

    Raises:
        ConfigError: The environment is not that of a launcher.
    """

    def __init__(self) -> None:
        try:
            self.count = int(os.environ.get("WORLD_SIZE", "1"))
            self.rank = int(os.environ["RANK"]) if self.count > 1 else 0
            self.local_rank = int(os.environ.get("LOCAL_RANK", str(self.rank)))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"RANK, LOCAL_RANK and WORLD_SIZE are not values that a launcher sets: {error}"
            ) from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
            return int(store.add("failed processes", 1)) == 1
        except (RuntimeError, ValueError):  # the store has ended with the process that kept it
            return True  # rather said twice than never
