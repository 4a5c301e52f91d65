"""Options that several commands and scripts share, and the check of an option's value."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_predictor.errors import CheckpointError, ConfigError
from attention_predictor.kinds import Kind, UnreadableError, whole
from attention_predictor.kinds import whole_numbers as read_whole_numbers
from attention_predictor.settings import reader

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
    """Refuse wrong model arguments that can be detected without loading anything."""
    check_model_name(args.model)
    check_dtype(args.dtype)


def check_model_name(name: str | None) -> str:
    """Return the name; ``ConfigError`` if there is none, ``CheckpointError`` for GGUF files."""
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
    """Raise ``ConfigError`` for an unknown dtype."""
    if name not in DTYPE_NAMES:
        raise ConfigError(f"dtype={name!r} is not allowed: expected one of {', '.join(DTYPE_NAMES)}")


def add_option(
    parser: argparse._ActionsContainer, option: str, kind: Kind, default: Any, says: str, *, required: bool = False
) -> None:
    """Add an option whose value has a kind; a value that is not allowed is refused when it is parsed.

    Args:
        default: Is shown behind the help text, unless it is ``None``.
    """
    shown = "" if default is None else " (%(default)s)"
    parser.add_argument(
        option,
        type=reader(kind),
        action=_Checked,
        kind=kind,
        default=default,
        required=required,
        metavar=kind.metavar,
        help=says + shown,
    )


class _Checked(argparse.Action):
    """Stores an allowed value; else raises a ``ConfigError`` that names option, value and what is allowed."""

    def __init__(self, *args: Any, kind: Kind, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kind = kind

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if (expected := self.kind.expected(values)) is not None:
            raise ConfigError(f"{self.option_strings[0]} {values}: expected {expected}")
        setattr(namespace, self.dest, values)


def whole_numbers(option: str, text: str) -> list[int]:
    """``"256,512"`` as numbers; ConfigError, naming the option, for anything else."""
    try:
        return read_whole_numbers(text, ",")
    except UnreadableError as error:
        raise ConfigError(f"{option} {error}") from error
