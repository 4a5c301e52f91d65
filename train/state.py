"""The state of an unfinished training run, from which it continues with the same loss curve."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attention_predictor.errors import CheckpointError, ConfigError, one_line
from attention_predictor.predictor.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from attention_predictor.predictor.model import AttentionPredictor
from attention_predictor.train.report import CARD_FILE
from attention_predictor.writing import write_atomically

FORMAT_VERSION = 1
STATE_FILE = "training-state.pt"
PARTS = {"step", "best", "best_mean", "validation", "curve", "predictor", "optimizer", "options"}


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Write the state atomically."""
    packed = io.BytesIO()  # on a full disk torch.save to a file raises an unclear error
    torch.save({"format_version": FORMAT_VERSION, **state}, packed)
    write_atomically(directory / STATE_FILE, packed.getvalue())


def read_state(directory: Path, options: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The state of the run in `directory`; `None` if there is nothing to continue.

    ConfigError if there is and `resume` is not asked for, or if its `options` were others; CheckpointError for a file
    that can't be read or was not written by `write_state`.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return None
    if not resume:
        raise ConfigError(f"{path}: an unfinished run is here; continue it with --resume, or delete the file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path}: not a training state ({one_line(error)})") from error
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}; delete it to start again"
        )
    if missing := sorted(PARTS - state.keys()):
        raise CheckpointError(f"{path}: not a training state, lacks {', '.join(missing)}")
    if others := _others(state["options"], options):
        raise ConfigError(f"{path}: the unfinished run had other options ({others})")
    return state


def read_finished(directory: Path, options: dict[str, Any], *, resume: bool, block_size: int) -> dict[str, Any] | None:
    """The metrics of the finished predictor in `directory`; `None` if there is none, or an unfinished run.

    ConfigError if there is and `resume` is not asked for, or if it was trained with other `options`, the `recording`
    among them.
    """
    if (directory / STATE_FILE).exists():
        return None
    if not (directory / WEIGHTS_FILE).exists():
        if foreign := [name for name in (CONFIG_FILE, CARD_FILE) if (directory / name).exists()]:
            raise ConfigError(f"{directory}: training would replace {foreign[0]} here; choose another directory")
        return None
    if not resume:
        raise ConfigError(
            f"{directory}: a predictor is here already; choose another directory, delete this one, or give --resume to "
            "keep it"
        )
    facts = AttentionPredictor.from_pretrained(directory, block_size=block_size).training_facts
    before = facts.get("options", {}) | {"recording": facts.get("recording")}
    if others := _others(before, options):
        raise ConfigError(f"{directory}: the predictor here was trained with other options ({others})")
    if facts["metrics"]["interrupted"]:
        raise ConfigError(f"{directory}: the predictor here is of an interrupted run without {STATE_FILE}: delete it")
    return facts["metrics"]


def _others(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that differ, in words."""
    return "; ".join(
        f"{name} was {before.get(name)!r}, is {value!r}" for name, value in now.items() if before.get(name) != value
    )


def restore(directory: Path, state: dict[str, Any], predictor: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore predictor and optimiser; CheckpointError if the state does not fit them."""
    try:
        for part in ("best", "predictor"):
            predictor.load_state_dict(state[part])
        optimizer.load_state_dict(state["optimizer"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / STATE_FILE}: of another predictor ({one_line(error)}); delete the file to start again"
        ) from error


def forget_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)
