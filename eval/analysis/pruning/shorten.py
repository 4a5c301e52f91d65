"""A model without some of its layers: in memory, and as a directory that loads like any other."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from attention_predictor.errors import AttachError, ConfigError, WriteError, one_line
from attention_predictor.writing import writing

# Lists of layer numbers in configurations of transformers; others with "layer" in their name that are as long as the
# model is deep have an entry for each layer.
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model; ``AttachError`` if they can't be found."""
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    config = model.config.get_text_config(decoder=True)
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        raise AttachError(
            f"{type(model).__name__}: no list of {config.num_hidden_layers} decoder layers was found in it"
        )
    return layers


@contextmanager
def without_layers(model: PreTrainedModel, removed: Collection[int]) -> Iterator[PreTrainedModel]:
    """The model without these layers, for the time of a ``with`` block; no weights are copied.

    Raises:
        AttachError: The layers can't be found, or they use keys and values of other layers.
        ConfigError: Not one layer would be left, or the configuration can't describe what would be.
    """
    layers, decoder, config = decoder_layers(model), model.get_decoder(), model.config.get_text_config(decoder=True)
    if getattr(config, "num_kv_shared_layers", None):
        raise AttachError(f"{type(model).__name__}: its layers share keys and values, so none can be removed")
    kept = [number for number in range(len(layers)) if number not in removed]
    if not kept:
        raise ConfigError(f"removing {len(removed)} of {len(layers)} layers would leave none")
    before = {name: getattr(config, name) for name in _cut(config, kept)}
    try:
        decoder.layers = nn.ModuleList(layers[number] for number in kept)
        _number(decoder.layers)
        for name, value in _cut(config, kept).items():
            setattr(config, name, value)
        _check_described(model)
        yield model
    finally:
        decoder.layers = layers
        _number(layers)
        for name, value in before.items():
            setattr(config, name, value)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, generation settings and tokenizer.

    Args:
        dtype: Type of the saved weights.
    """
    own = {name: weight.data for name, weight in model.named_parameters()}
    logging.disable_progress_bar()
    try:
        if model.dtype != dtype:  # buffers stay: rounded angles would not come back
            for weight in model.parameters():
                weight.data = weight.data.to(dtype)
            model.config.dtype = dtype
        with writing(out):
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    except SafetensorError as error:  # a full disk, for example
        raise WriteError(f"{out}: can't be written: {one_line(error)}") from error
    finally:
        logging.enable_progress_bar()
        for name, weight in model.named_parameters():
            weight.data = own[name]
        model.config.dtype = model.dtype


def _cut(config: PreTrainedConfig, kept: list[int]) -> dict[str, Any]:
    """The configuration's per-layer entries for the kept layers."""
    depth = config.num_hidden_layers
    changed: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if name in NUMBERS and value:
            changed[name] = [kept.index(number) for number in value if number in kept]
        elif "layer" in name and isinstance(value, (list, tuple)) and len(value) == depth:
            changed[name] = [value[number] for number in kept]
    return changed


def _number(layers: nn.ModuleList) -> None:
    """Set ``layer_idx`` of every module in a layer: attention finds its cache by it."""
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]


def _check_described(model: PreTrainedModel) -> None:
    """``ConfigError`` unless a model made of the configuration has these weights, by name and shape."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(model.config)
    ours, theirs = ({name: x.shape for name, x in one.state_dict().items()} for one in (model, twin))
    if ours != theirs:
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"{type(model).__name__} without these layers can't be described by its configuration: {name} is "
            f"{_shape(ours.get(name))}, and would be {_shape(theirs.get(name))} when loaded"
        )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
