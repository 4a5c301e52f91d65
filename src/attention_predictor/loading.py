"""Models and tokenizers by directory or hub name, with errors of one line."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from attention_predictor.predictor.errors import CheckpointError, ConfigError, one_line

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 3  # names in an error of one line


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; ``CheckpointError`` if it can't be had."""
    try:
        return AutoTokenizer.from_pretrained(_require(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot load a tokenizer from {name!r}: {one_line(error)}") from error


def find_device(name: str) -> torch.device:
    """The device of that name; ``ConfigError`` if it can't be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} can't be used: {one_line(error)}") from error
    return device


def load_model(name: str | None, device: str = "cpu", dtype: str = "auto") -> PreTrainedModel:
    """A causal language model, in evaluation mode, on the device.

    ``dtype="auto"`` takes the checkpoint's own, but float32 on a CPU, where half precisions are slow.

    Raises:
        CheckpointError: It can't be loaded, or lacks weights, which transformers would make up at random.
        ConfigError: Unknown dtype or device.
    """
    name = _require(name)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not allowed: expected one of {', '.join(DTYPES)}")
    target = find_device(device)
    wanted = torch.float32 if dtype == "auto" and target.type == "cpu" else DTYPES[dtype]
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of missing weights it prints a table, and goes on
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, output_loading_info=True)
    except Exception as error:  # whatever a foreign or damaged checkpoint makes the loader raise
        raise CheckpointError(f"cannot load a causal language model from {name!r}: {one_line(error)}") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    model, info = pair
    if missing := sorted(info["missing_keys"]):  # tied weights are not among them
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise CheckpointError(f"{name!r} lacks weights of its model: {', '.join(missing[:SHOWN])}{more}")
    torch.nn.Module.to(model, target)  # transformers' own `to` is wrapped in a way that mypy can't follow
    return model.eval()


def _require(name: str | None) -> str:
    if name is None:
        raise ConfigError("--model is required: no pocket model beside this installation")
    return name
