"""Options that several commands and scripts take, and how the value of one is checked."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.kinds import Kind, NotAllowedError, whole
from attention_predictor.kinds import whole_numbers as read_whole_numbers

AUTO = "auto"
DTYPE_NAMES = (AUTO, "float32", "bfloat16", "float16")
GGUF = ".gguf"

# The folders of the package are links into a checkout; an installed wheel has no models beside it.
_POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket-lm"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model --device --dtype --seed``."""
    default = str(_POCKET) if _POCKET.is_dir() else None
    shown = "the pocket model" if default else "required: no pocket model beside this installation"
    parser.add_argument("--model", default=default, metavar="M", help=f"directory or hub name (default: {shown})")
    add_device_argument(parser)
    parser.add_argument(
        "--dtype", default=AUTO, help=f"one of {', '.join(DTYPE_NAMES)}; auto is the model's, float32 on a CPU"
    )
    add_option(parser, "--seed", whole(), 0, "seed of everything random")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device", default=AUTO, metavar="D", help="such as cpu or cuda:1; auto: a GPU if there is one"
    )


def check_model_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong with them without loading anything."""
    check_model_name(args.model)
    check_dtype(args.dtype)


def check_model_name(name: str | None) -> str:
    """The name itself; ``ConfigError`` if there is none, ``CheckpointError`` if it is of GGUF files."""
    if name is None:
        raise ConfigError("--model is required: no pocket model beside this installation")
    path = Path(name)
    file = path if path.suffix.lower() == GGUF else None
    if file is None and path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        file = next((one for one in sorted(path.iterdir()) if one.suffix.lower() == GGUF), None)
    if file is None:
        return name
    source = f"{str(file.parent)!r}, gguf_file={file.name!r}"
    raise CheckpointError(
        f"{name!r} is a model in GGUF: convert it once with transformers, "
        f"AutoModelForCausalLM.from_pretrained({source}).save_pretrained('converted') and "
        f"AutoTokenizer.from_pretrained({source}).save_pretrained('converted'), then give --model converted"
    )


def check_dtype(name: str) -> None:
    """``ConfigError`` for a name that is no dtype's."""
    if name not in DTYPE_NAMES:
        raise ConfigError(f"dtype={name!r} is not allowed: expected one of {', '.join(DTYPE_NAMES)}")


def add_option(
    parser: argparse._ActionsContainer, option: str, kind: Kind, default: Any, says: str, *, required: bool = False
) -> None:
    """An option with a value of a kind; one that is not allowed is refused when it is read.

    Args:
        default: Is shown behind the help text, unless it is ``None``, ``()`` or ``False``.
    """
    shown = "" if default in (None, ()) or default is False else " (%(default)s)"
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
    """The error of an option's value that is not allowed."""
    return ConfigError(f"{option} {shlex.quote(given) if not given or ' ' in given else given}: expected {expected}")


class _Checked(argparse.Action):
    """Keeps the value, if it is allowed; else a ``ConfigError`` names the option, the value and what is allowed."""

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


def whole_numbers(option: str, text: str) -> list[int]:
    """``"256,512"`` as numbers; ConfigError, naming the option, for anything else."""
    try:
        return read_whole_numbers(text, ",")
    except ValueError as error:
        raise refused(option, text, "numbers separated by commas") from error
