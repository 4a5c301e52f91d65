"""TrainOptions: everything that decides what a training run computes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from attention_predictor.errors import ConfigError
from attention_predictor.kinds import Kind, number, one_of, whole

# Architectures that can be trained, and steps of a document learned from at once. Neighbouring steps teach the same;
# the window network shares no work.
TARGETS = {"paper": 2, "time-filters": 16}
LOSSES = ("ce", "mse")
PRECISIONS = ("no", "bf16")
TRACKERS = ("none", "tensorboard", "wandb")
NAMES: dict[str, Kind] = {"arch": one_of(sorted(TARGETS)), "loss": one_of(LOSSES), "precision": one_of(PRECISIONS)}
NUMBERS: dict[str, Kind] = {
    **dict.fromkeys(("horizon", "steps", "batch", "log_every"), whole(1)),
    "seed": whole(),
    "lr": number("above 0, at most 1", lambda rate: 0 < rate <= 1),
    "val_fraction": number("a share above 0, at most 0.9", lambda share: 0 < share <= 0.9, "SHARE"),
}


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a run; a run is only continued with the same ones.

    Attributes:
        arch: Architecture to train.
        init: Checkpoint of that architecture to start from, or ``None``.
        loss: ``"ce"``, cross-entropy on block mass, or ``"mse"``, squared error of scores as published.
        horizon: Steps ahead whose largest mass is the target.
        steps: Optimiser steps.
        batch: Records (layer, KV head) a step, over all processes.
        lr: Largest learning rate; warm-up over the first twentieth, then half a cosine down to 0.
        seed: Of everything random.
        val_fraction: Share of texts (files, or rows of a data set) held out where the recording names none.
        log_every: Steps from one validation, and one saved state, to the next.
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
        """As the options of ``attnpred train`` say."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls)})

    def __post_init__(self) -> None:
        for name, kind in (NAMES | NUMBERS).items():
            value = getattr(self, name)
            if (expected := kind.expected(value)) is not None:
                raise ConfigError(f"{name}={value!r} is not allowed: expected {expected}")
