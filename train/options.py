"""TrainOptions: all settings that affect the result of a training run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from attention_predictor.errors import ConfigError
from attention_predictor.kinds import SEED, Kind, number, one_of, whole

# Architectures that can be trained, and the number of steps of a document per sample. Neighbouring steps add little,
# and the window network can't share work between steps.
TARGETS = {"paper": 2, "time-filters": 16}
LOSSES = ("ce", "mse")
PRECISIONS = ("no", "bf16")
TRACKERS = ("none", "tensorboard", "wandb")
NAMES: dict[str, Kind] = {"arch": one_of(sorted(TARGETS)), "loss": one_of(LOSSES), "precision": one_of(PRECISIONS)}
NUMBERS: dict[str, Kind] = {
    **dict.fromkeys(("horizon", "steps", "batch", "log_every"), whole(1)),
    "seed": SEED,
    "lr": number("above 0, at most 1", lambda rate: 0 < rate <= 1),
    "val_fraction": number("a share above 0, at most 0.9", lambda share: 0 < share <= 0.9, "SHARE"),
}


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
        for name, kind in (NAMES | NUMBERS).items():
            value = getattr(self, name)
            if (expected := kind.expected(value)) is not None:
                raise ConfigError(f"{name}={value!r} is not allowed: expected {expected}")
