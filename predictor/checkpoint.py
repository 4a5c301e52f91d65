"""Checkpoint files of a predictor, `model.safetensors` and `config.json`: writing, reading and checking."""

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from attention_predictor.errors import CheckpointError, DataError, WriteError, one_line
from attention_predictor.reading import read_json
from attention_predictor.writing import json_bytes, write_together

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each atomically; CheckpointError if that fails."""
    weights = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    text = json_bytes({"format_version": FORMAT_VERSION, **config}, indent=2) + b"\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_together({directory / WEIGHTS_FILE: weights, directory / CONFIG_FILE: text})
    except WriteError as error:
        raise CheckpointError(f"{directory}: can't save a predictor here: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{directory}: can't save a predictor here: {error.strerror or error}") from error


def read_config(directory: Path, architectures: Iterable[str], block_size: int) -> dict[str, Any]:
    """Read the configuration and check everything that does not need the weights."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: file is missing; allowed: a directory written by save()")
    try:
        config = read_json(path)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found a JSON {type(config).__name__}, expected an object")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this release reads 1 to {FORMAT_VERSION}"
            + ("; upgrade attention-predictor" if type(version) is int and version > FORMAT_VERSION else "")
        )
    names = sorted(architectures)
    _expect(path, "arch", config.get("arch"), names, f"one of {', '.join(names)}")
    _check_block_size(path, config.get("block_size"), block_size)
    if not isinstance(config.get("training", {}), dict):
        raise CheckpointError(f"{path}: training is {config['training']!r}, expected an object")
    return config


def _check_block_size(path: Path, found: Any, asked: int) -> None:
    """A predictor works only with the block size it was trained on."""
    again = ""
    if type(found) is int and found != asked:
        again = (
            f": this predictor was trained on blocks of {found} tokens, block_size={asked} needs one trained on blocks "
            f"of {asked}: attnpred record --block-size {asked} … and attnpred train make it"
        )
    _expect(path, "block_size", found, [asked], f"{asked}{again}")


def check_rows(directory: Path, config: Mapping[str, Any], rows: int) -> None:
    """Refuse a file whose number of prompt rows is not the architecture's."""
    _expect(directory / CONFIG_FILE, "rows", config.get("rows"), [rows], str(rows))


def read_tensors(directory: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights on the CPU, with exactly the names and shapes of `expected` and no NaN or infinity."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing; allowed: a directory written by save()")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({one_line(error)})") from error
    _check_tensors(path, tensors, expected)
    return tensors


def read_upstream(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state-dict that `torch.save` pickled, unpickled with weights only, checked as in `read_tensors`."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: file is missing; allowed: a state-dict of the published network (best_model.pth)"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path}: not a file of weights only ({one_line(error)})") from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: found {type(tensors).__name__}, expected tensors by name: {sorted(expected)}")
    _check_tensors(path, tensors, expected)
    return dict(tensors)


def _check_tensors(path: Path, tensors: Mapping[Any, Any], expected: Mapping[str, Tensor]) -> None:
    if tensors.keys() != expected.keys():
        raise CheckpointError(
            f"{path}: missing tensors {sorted(expected.keys() - tensors.keys())}, "
            f"unexpected tensors {sorted(map(str, tensors.keys() - expected.keys()))}; allowed: {sorted(expected)}"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is of type {type(tensor).__name__}, expected a tensor")
        shape, allowed = list(tensor.shape), list(expected[name].shape)
        if shape != allowed:
            raise CheckpointError(f"{path}: tensor {name} has shape {shape}, expected {allowed}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: tensor {name} has dtype {tensor.dtype}, expected floating point")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity, expected finite numbers")


def _expect(path: Path, field: str, found: Any, allowed: Container[Any], wording: str) -> None:
    # bool is an int and 16.0 == 16: compare the type too, so that a hand-edited file is refused, not
    # guessed at.
    if type(found) not in (int, str) or found not in allowed:
        raise CheckpointError(f"{path}: {field} is {found!r}, expected {wording}")
