"""Loads models and tokenizers by directory or hub name, with errors of one line."""

from __future__ import annotations

import inspect
import io
import json
import logging as python_logging
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.integrations.gguf.kernels import get_gguf_kernel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file, logging

from attention_predictor.arguments import AUTO, DEVICE_MAPS, DTYPE_NAMES, PACKED, check_dtype, check_model_name
from attention_predictor.errors import CheckpointError, ConfigError, one_line
from attention_predictor.gguf_file import GgufFile, hub_parts, is_gguf
from attention_predictor.reading import read_text

DTYPES: dict[str, Any] = {name: name if name == AUTO else getattr(torch, name) for name in DTYPE_NAMES}
SHOWN = 3  # names in an error of one line
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

logger = python_logging.getLogger(__name__)


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; ``CheckpointError`` if it can't be loaded.

    For a GGUF file without one, the tokenizer in its folder.
    """
    name = check_model_name(name)
    file = gguf_file(name)
    folder, options = _source(name, file)
    if file is not None and not file.has_tokenizer:
        options = {}
        if not any((Path(folder) / one).is_file() for one in TOKENIZER_FILES):
            raise CheckpointError(
                f"{name!r} has no tokenizer, and its directory has none: expected one of {', '.join(TOKENIZER_FILES)}"
            )
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # a foreign or damaged tokenizer may raise anything
        raise CheckpointError(f"cannot load a tokenizer from {name!r}: {_reason(name, error)}") from error


def load_config(name: str | None, what: str = "the configuration of") -> Any:
    """The configuration of a model; ``CheckpointError``, which names its use ``what``, if it can't be loaded."""
    name = check_model_name(name)
    folder, options = _source(name, gguf_file(name))
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except Exception as error:
        raise CheckpointError(f"cannot load {what} {name!r}: {_reason(name, error)}") from error


def gguf_file(name: str) -> GgufFile | None:
    """The GGUF file with this name, downloaded from the hub if needed; ``None`` for other kinds of models.

    Raises:
        CheckpointError: It can't be found, or is damaged.
    """
    if not is_gguf(name) or Path(name).is_dir():
        return None
    path, parts = Path(name), hub_parts(name)
    if not path.exists() and parts is not None:
        try:
            path = Path(str(cached_file(*parts)))
        except Exception as error:
            raise CheckpointError(
                f"{name!r} is not a local file, and the hub could not provide it: {one_line(error)}"
            ) from error
    return GgufFile.read(path)


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


def read_device_map(given: str) -> str | dict[str, int | str]:
    """The value of ``from_pretrained``'s ``device_map`` for one of its names, or from a JSON file.

    Raises:
        ConfigError: Another name, no such file, or one that does not name a device for each module.
    """
    if given in DEVICE_MAPS:
        return given
    names = ", ".join(DEVICE_MAPS)
    if not given.endswith(".json"):
        raise ConfigError(f"device_map={given!r} is not allowed: expected {names}, or a JSON file")
    try:
        found = json.loads(read_text(Path(given), "device map"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"device map {given} is not JSON: {one_line(error)}") from error
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'device map {given}: expected an object of modules and devices, such as {{"lm_head": 0}}')
    for module, place in found.items():
        if isinstance(place, bool) or not isinstance(place, int | str):
            raise ConfigError(f"device map {given}: {module!r} is on {place!r}, expected a device, its number or disk")
        if place != "disk":
            find_device(f"cuda:{place}" if isinstance(place, int) else place)
    return found


def load_model(
    name: str | None, device: str = "cpu", dtype: str = AUTO, ranks: int = 1, device_map: str | None = None
) -> PreTrainedModel:
    """A causal language model, in evaluation mode, on the device.

    ``dtype="auto"`` takes the checkpoint's own, but float32 on a CPU, where half precisions are slow; of a checkpoint
    with quantised weights its own everywhere. The weights of a GGUF file are unpacked into the dtype (``"auto"``:
    bfloat16, where the file holds blocks), or kept as they are with ``"packed"``, which computes in float32.

    Args:
        ranks: Processes of a launcher among which it is divided by tensor parallelism; each loads its part, and all
            have to call this. transformers joins them by torch.distributed and chooses each one's GPU.
        device_map: Spreads the model over several devices in place of ``device``, as ``read_device_map`` allows;
            accelerate brings the weights of layers on ``cpu`` or ``disk`` to the first GPU for each forward.

    Raises:
        CheckpointError: It can't be loaded, or lacks weights, which transformers would make up at random.
        ConfigError: Unknown dtype, device or device map, or weights can't stay packed, or can't be divided.
    """
    name = check_model_name(name)
    check_dtype(dtype)
    target, places = find_device(device), None if device_map is None else read_device_map(device_map)
    file = gguf_file(name)
    if places is not None and (ranks > 1 or dtype == PACKED):
        what = f"{ranks} processes" if ranks > 1 else f"dtype={PACKED!r}"
        raise ConfigError(f"device_map={device_map!r} spreads whole, unpacked models in one process: found {what}")
    if ranks > 1:
        _check_divisible(name, file, target, ranks)
    folder, options = _source(name, file)
    if file is not None:
        options |= _gguf_options(file, target, dtype)
    elif dtype == PACKED:
        raise ConfigError(f"dtype={PACKED!r}: {name!r} is not a GGUF file")
    elif method := _quantisation(name):
        options |= {"dtype": DTYPES[dtype], "device_map": {"": target}}
    else:
        options |= {"dtype": torch.float32 if dtype == AUTO and target.type == "cpu" else DTYPES[dtype]}
    if ranks > 1:
        options |= tensor_parallel_options(ranks)
    if places is not None:
        options |= {"device_map": places}
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else it prints a table of missing weights, and continues
    # The progress bar of GGUF files can't be disabled. In a log file it is a line for every update.
    shown = sys.stderr if file is None or sys.stderr.isatty() else io.StringIO()
    try:
        with redirect_stderr(shown):
            pair: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # a foreign or damaged checkpoint may raise anything
        raise CheckpointError(f"cannot load a causal language model from {name!r}: {_reason(name, error)}") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    model, info = pair
    if missing := sorted(info["missing_keys"]):  # tied weights are not listed
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise CheckpointError(f"{name!r} lacks weights that its model needs: {', '.join(missing[:SHOWN])}{more}")
    if "device_map" not in options and ranks == 1:  # else it is there, and some quantised weights refuse to be moved
        torch.nn.Module.to(model, target)  # transformers' own `to` is wrapped in a way that mypy can't follow
    if dtype == PACKED and not any(weight.dtype == torch.uint8 for weight in model.parameters()):
        raise ConfigError(f"dtype={PACKED!r}: transformers kept no weight of {name!r} packed")
    if not file and method and not getattr(model, "is_quantized", False):
        logger.warning(
            "%s: transformers unpacked its %s weights, because it can't compute with them here", name, method
        )
    return model.eval()


def tensor_parallel_options(ranks: int) -> dict[str, Any]:
    """The options that divide a model among processes; their name depends on the version of transformers."""
    if "tp_size" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    return {"tp_plan": AUTO, "tp_size": ranks}


def _check_divisible(name: str, file: GgufFile | None, device: torch.device, ranks: int) -> None:
    """``ConfigError`` for a model, or a device, that tensor parallelism is not known to work with."""
    what = f"{name!r} can't be divided among {ranks} processes"
    if "LOCAL_RANK" not in os.environ:  # transformers asks for it
        raise ConfigError(f"{what}: LOCAL_RANK is not set, which a launcher, such as torchrun, sets for every process")
    if file is not None or (method := _quantisation(name)):
        form = "in GGUF" if file is not None else f"quantised by {method}"
        raise ConfigError(f"{what}: its weights are {form}, allowed are plain ones")
    config = load_config(name).get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and heads % ranks:
        raise ConfigError(f"{what}: it has {heads} KV heads, allowed are numbers of processes that divide {heads}")
    own = "cuda" if torch.cuda.is_available() else "cpu"
    if device.type != own:  # transformers asks for no device
        raise ConfigError(
            f"device={str(device)!r}: several processes divide a model over {own!r} alone, on this machine"
        )


def _source(name: str, file: GgufFile | None) -> tuple[str, dict[str, Any]]:
    """The arguments of ``from_pretrained``: a directory or hub name, and options; ``file`` is the model's, if in GGUF.

    The path of a GGUF file is absolute: transformers would prefer a file of that name in the working directory.
    """
    return (name, {}) if file is None else (str(file.path.parent), {"gguf_file": str(file.path.absolute())})


def _gguf_options(file: GgufFile, device: torch.device, dtype: str) -> dict[str, Any]:
    """The options to load a GGUF file; ``ConfigError`` if its weights can't stay packed as requested."""
    packed = dtype == PACKED
    options: dict[str, Any] = {"quantization_config": GgufConfig(gguf_file=str(file.path), dequantize=not packed)}
    if not packed:
        own = "float32" if device.type == "cpu" else file.dtype
        return options | {"dtype": DTYPES[own if dtype == AUTO else dtype]}
    if file.architecture not in GGUF_ARCHS:
        raise ConfigError(
            f"dtype={PACKED!r}: transformers {transformers.__version__} can't keep packed weights of the architecture "
            f"{file.architecture!r} (only of {', '.join(sorted(GGUF_ARCHS))}): use another dtype to unpack them"
        )
    if device.type == "cpu" or not get_gguf_kernel():
        raise ConfigError(
            f"dtype={PACKED!r}: no kernel for packed weights on {device}: it needs a GPU, the package "
            "kernels and access to the hub; use another dtype to unpack them"
        )
    # Named, or transformers fetches another attention with the kernel.
    return options | {"dtype": torch.float32, "device_map": {"": device}, "attn_implementation": "sdpa"}


def _quantisation(name: str) -> str | None:
    """How a checkpoint's weights are quantised, by its configuration: ``bitsandbytes``, ``gptq``, ….

    Raises:
        CheckpointError: transformers knows no such way; it would take the weights for plain ones.
    """
    config = load_config(name, "a causal language model from")
    for one in (config, config.get_text_config(decoder=True)):
        if found := getattr(one, "quantization_config", None):
            settings = dict(found) if isinstance(found, dict) else found.to_dict()
            method = settings.get("quant_method")
            method = getattr(method, "value", method)
            bits = any(settings.get(flag) for flag in ("load_in_4bit", "load_in_8bit"))  # of bitsandbytes
            if method not in AUTO_QUANTIZATION_CONFIG_MAPPING and not bits:
                known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
                raise CheckpointError(f"{name!r} is quantised with {method!r}; transformers supports {known}")
            return str(method)
    return None


def _reason(name: str, error: Exception) -> str:
    """What the loader says; and what to do, where a repository of the hub seems to have GGUF files alone."""
    hint = ": GGUF files are named by --gguf-file" if "gguf" in name.lower() and not is_gguf(name) else ""
    return one_line(error) + hint
