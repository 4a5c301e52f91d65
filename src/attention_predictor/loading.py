"""Loads models and tokenizers by directory or hub name, with errors of one line."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from attention_predictor.arguments import AUTO, DTYPE_NAMES, GGUF, check_dtype, check_model_name
from attention_predictor.errors import CheckpointError, ConfigError, one_line

DTYPES: dict[str, Any] = {name: name if name == AUTO else getattr(torch, name) for name in DTYPE_NAMES}
SHOWN = 3  # names in an error of one line


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; ``CheckpointError`` if it can't be loaded."""
    name = check_model_name(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a foreign or damaged tokenizer may raise anything
        raise CheckpointError(f"cannot load a tokenizer from {name!r}: {_reason(name, error)}") from error


def load_config(name: str | None, what: str = "the configuration of") -> Any:
    """The configuration of a model; ``CheckpointError``, which names its use ``what``, if it can't be loaded."""
    name = check_model_name(name)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:
        raise CheckpointError(f"cannot load {what} {name!r}: {_reason(name, error)}") from error


def device_name(name: str) -> str:
    """The device's name, with ``auto`` resolved."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == AUTO else name


def find_device(name: str) -> torch.device:
    """The device with that name; ``ConfigError`` if it can't be used."""
    try:
        device = torch.device(device_name(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} can't be used: {one_line(error)}") from error
    return device


def load_model(name: str | None, device: str = "cpu", dtype: str = AUTO) -> PreTrainedModel:
    """A causal language model, in evaluation mode, on the device.

    ``dtype="auto"`` takes the checkpoint's own, but float32 on a CPU, where half precisions are slow.

    Raises:
        CheckpointError: It can't be loaded, or lacks weights, which transformers would make up at random.
        ConfigError: Unknown dtype or device.
    """
    name = check_model_name(name)
    check_dtype(dtype)
    target = find_device(device)
    wanted = torch.float32 if dtype == AUTO and target.type == "cpu" else DTYPES[dtype]
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else it prints a table of missing weights, and continues
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, output_loading_info=True)
    except Exception as error:  # a foreign or damaged checkpoint may raise anything
        raise CheckpointError(f"cannot load a causal language model from {name!r}: {_reason(name, error)}") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    model, info = pair
    if missing := sorted(info["missing_keys"]):  # tied weights are not listed
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise CheckpointError(f"{name!r} lacks weights of its model: {', '.join(missing[:SHOWN])}{more}")
    torch.nn.Module.to(model, target)  # transformers' own `to` is wrapped in a way that mypy can't follow
    return model.eval()


def _reason(name: str, error: Exception) -> str:
    """The loader's error, with advice if a hub repository seems to have only GGUF files."""
    hint = ": GGUF files need gguf_file=… of transformers, and to be saved anew" if GGUF[1:] in name.lower() else ""
    return one_line(error) + hint
