"""Experiment trackers, which receive a run's figures in addition to its own files."""

from __future__ import annotations

import importlib.util
import netrc
import os
from typing import Any

from accelerate import Accelerator

from attention_predictor.errors import ConfigError
from attention_predictor.train.options import TRACKERS

PROJECT = "attention-predictor"


def check_tracker(name: str) -> None:
    """Raise ConfigError for an unknown tracker, or one whose package is missing."""
    if name not in TRACKERS:
        raise ConfigError(f"tracker={name!r} is not one of {', '.join(TRACKERS)}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"tracker={name!r} needs its package: pip install {name}")


def start_tracker(accelerator: Accelerator, name: str, directory: str, options: dict[str, Any]) -> None:
    """Start a run. Without a key wandb works offline: it does not prompt, and `wandb sync` can upload the run later."""
    if name == "none":
        return
    arguments: dict[str, Any] = {}
    if name == "wandb":
        if not _has_wandb_key():
            os.environ.setdefault("WANDB_MODE", "offline")
        arguments = {"wandb": {"dir": directory}}
    config = {key: value if value is not None else "" for key, value in options.items()}
    accelerator.init_trackers(PROJECT, config=config, init_kwargs=arguments)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no such file, or not readable for wandb either
