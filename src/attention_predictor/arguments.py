"""Options that several commands and scripts share, and the check of an option's value."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.gguf_file import GgufFile, check_packages, gguf_files, hub_parts, is_gguf
from attention_predictor.kinds import SEED, Kind, NotAllowedError, one_of
from attention_predictor.kinds import whole_numbers as read_whole_numbers
from attention_predictor.launcher import Launcher
from attention_predictor.writing import why_not_writable

AUTO = "auto"
DTYPE_NAMES = (AUTO, "float32", "bfloat16", "float16")
PACKED = "packed"
DEVICE_MAPS = ("auto", "balanced", "sequential")
MODEL_DTYPES = (*DTYPE_NAMES, PACKED)

# The folders of the package are links into a checkout; an installed wheel has no models beside it.
_POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket-lm"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model --gguf-file --device --dtype --seed``."""
    default = str(_POCKET) if _POCKET.is_dir() else None
    shown = "the pocket model" if default else "required, as this installation has no pocket model"
    what = f"model directory, hub name or GGUF file (default: {shown})"
    parser.add_argument("--model", default=default, metavar="M", help=what)
    parser.add_argument(
        "--gguf-file", metavar="NAME", help="which GGUF file of the directory or hub repository to load"
    )
    add_device_argument(parser)
    what = f"type of the weights: {', '.join(MODEL_DTYPES)}; auto: the model's own on a GPU, float32 on a CPU;"
    what += f" {PACKED}: GGUF weights stay quantised"
    add_option(parser, "--dtype", one_of(MODEL_DTYPES), AUTO, what)
    add_option(parser, "--seed", SEED, 0, "random seed")


def add_device_map_argument(parser: argparse.ArgumentParser) -> None:
    """``--device-map``."""
    what = f"spread the model over several devices in place of --device: {', '.join(DEVICE_MAPS)}, or a JSON file of"
    parser.add_argument("--device-map", metavar="MAP", help=f"{what} modules and devices")


def add_tp_argument(parser: argparse.ArgumentParser, shared: str) -> None:
    """``--tp``; ``shared`` is what processes of a launcher share without it."""
    what = "divide the model among the processes of a launcher (tensor parallelism); without it they share the"
    parser.add_argument("--tp", action="store_true", help=f"{what} {shared}")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device",
        default=AUTO,
        metavar="D",
        help="torch device, such as cpu or cuda:1; auto: a GPU if there is one (default: auto)",
    )


def check_model_arguments(args: argparse.Namespace) -> None:
    """Refuse wrong model arguments that need no loading to detect; merges ``--gguf-file`` into ``--model``."""
    if args.gguf_file is not None:
        args.model, args.gguf_file = _join(args.model, args.gguf_file), None
    check_model_name(args.model)
    device_map = vars(args).get("device_map")  # some commands have no such option
    if device_map is not None and args.device != AUTO:
        raise ConfigError(f"--device-map {device_map}: it takes the place of --device, found --device {args.device}")
    if device_map is not None and (count := Launcher().count) > 1:
        raise ConfigError(f"--device-map {device_map}: it spreads the model of one process, found {count} processes")
    if args.dtype == PACKED and not is_gguf(args.model):
        raise ConfigError(f"--dtype {PACKED}: --model {args.model} is not a GGUF file")


def check_model_name(name: str | None) -> str:
    """The name itself, if it may be a model's.

    Raises:
        ConfigError: There is none.
        CheckpointError: A directory or GGUF file is not there; the file is damaged, or can't be read for want of a
            package; or a directory holds nothing but GGUF files, and the name says not which.
    """
    if name is None:
        raise ConfigError("--model is required, because this installation has no pocket model")
    path = Path(name)
    if path.is_dir():
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")) and (files := gguf_files(path)):
            raise CheckpointError(f"{name!r} holds GGUF models only: choose one with --gguf-file: {', '.join(files)}")
    elif is_gguf(name):
        check_packages(name)
        if path.exists():
            GgufFile.read(path)
        elif hub_parts(name) is None:
            raise CheckpointError(f"{name!r} is neither a local file nor a hub name such as owner/name/file.gguf")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no name on the hub
        raise CheckpointError(f"{name!r}: no such directory")
    return name


def _join(model: str | None, file: str) -> str:
    """The name of a GGUF file in a directory or repository."""
    if model is None:
        raise ConfigError(f"--gguf-file {file}: --model is required: the directory or hub name that holds the file")
    folder = Path(model)
    if not is_gguf(file):
        raise ConfigError(f"--gguf-file {file}: expected a name that ends in .gguf")
    if folder.is_file():
        raise ConfigError(f"--gguf-file {file}: --model {model} is a file already: give only one of the two")
    if not folder.is_dir():
        return f"{model}/{file}"
    if not (folder / file).is_file():
        there = ", ".join(gguf_files(folder)) or "no GGUF file"
        raise CheckpointError(f"--gguf-file {file} is not in {model}, which holds {there}")
    return str(folder / file)


def check_dtype(name: str) -> None:
    """Raise ``ConfigError`` for an unknown dtype."""
    if name not in MODEL_DTYPES:
        raise ConfigError(f"dtype={name!r} is not allowed: expected one of {', '.join(MODEL_DTYPES)}")


def add_option(
    parser: argparse._ActionsContainer, option: str, kind: Kind, default: Any, says: str, *, required: bool = False
) -> None:
    """Add an option whose value has a kind; a value that is not allowed is refused when it is parsed.

    Args:
        default: Shown at the end of the help text, unless it is ``None``, ``()`` or ``False``.
    """
    shown = "" if default in (None, ()) or default is False else " (default: %(default)s)"
    alone = {} if kind.alone is None else {"nargs": "?", "const": kind.alone}
    parser.add_argument(
        option,
        action=_Checked,
        kind=kind,
        default=default,
        required=required,
        metavar=kind.metavar,
        help=says.replace("%", "%%") + shown,
        **alone,
    )


def refused(option: str, given: str, expected: str) -> ConfigError:
    """The error for an option's value that is not allowed."""
    return ConfigError(f"{option} {shlex.quote(given) if not given or ' ' in given else given}: expected {expected}")


class _Checked(argparse.Action):
    """Stores an allowed value; else raises a ``ConfigError`` that names option, value and what is allowed."""

    def __init__(self, *args: Any, kind: Kind, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kind = kind

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        value = values
        if isinstance(values, str):  # else the kind's value of an option alone
            try:
                value = self.kind.parse(values)
            except NotAllowedError as error:
                raise refused(self.option_strings[0], values, str(error)) from error
        setattr(namespace, self.dest, value)


def check_output(option: str, path: Path | None, *, folder: bool = False) -> None:
    """Raise ``ConfigError`` if the option names a file, or a ``folder`` for files, that can't be written.

    ``None``, an option that is not given, is allowed.
    """
    if path is not None and (reason := why_not_writable(path, folder=folder)) is not None:
        raise ConfigError(f"{option} {path}: can't be written: {reason}")


def whole_numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Parse ``"256,512"``; ConfigError, which names the option, for anything else or less than ``least``."""
    expected = f"numbers from {least} on, separated by commas"
    try:
        numbers = read_whole_numbers(text, ",")
    except ValueError as error:
        raise refused(option, text, expected) from error
    if min(numbers) < least:
        raise refused(option, text, expected)
    return numbers
