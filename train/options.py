"""TrainOptions: all settings that affect the result of a training run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from attention_predictor.errors import ConfigError

# Architectures that can be trained, and the number of steps of a document per sample. Neighbouring steps add little,
# and the window network can't share work between steps.
TARGETS = {"paper": 2, "time-filters": 16}
LOSSES = ("ce", "mse")
PRECISIONS = ("no", "bf16")
TRACKERS = ("none", "tensorboard", "wandb")


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a run. A run can be continued only with the same settings.

    Attributes:
        arch: Architecture to train.
        init: Checkpoint of that architecture to start from, or ``None``.
        loss: ``"ce"``, cross-entropy on block mass, or ``"mse"``, squared error of scores as published.
        horizon: The target is the largest mass within this many steps ahead.
        steps: Optimiser steps.
        batch: Records (layer, KV head) a step, over all processes.
        lr: Largest learning rate; warm-up over the first twentieth, then half a cosine down to 0.
        seed: Seed of all random numbers.
        val_fraction: Share of texts (files, or rows of a data set) held out if the recording defines no split.
        log_every: Steps between validations, after each of which the state is saved.
        precision: ``"bf16"`` runs the network in bf16; weights, states and loss stay in fp32.

    Raises:
        ConfigError: Names the option, its value and what is allowed.
    """

    arch: str = "time-filters"
    init: str | None = None
    loss: str = "ce"
    horizon: int = 24
    steps: int = 1000
    batch: int = 32
    lr: float = 3e-3
    seed: int = 0
    val_fraction: float = 0.1
    log_every: int = 100
    precision: str = "no"

    @classmethod
    def of(cls, args: argparse.Namespace) -> TrainOptions:
        """From the options of ``attnpred train``."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls)})

    def __post_init__(self) -> None:
        if self.arch not in TARGETS:
            raise ConfigError(f"arch={self.arch!r} can't be trained; choose from {', '.join(sorted(TARGETS))}")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r} is not a loss; choose from {', '.join(LOSSES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        for name in ("horizon", "steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name, top in (("lr", 1.0), ("val_fraction", 0.9)):
            if not 0 < getattr(self, name) <= top:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0 and at most {top}")
