"""``OffloadConfig``'s settings as text: command-line options, and fields of a rule."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from attention_predictor.errors import ConfigError
from attention_predictor.kinds import Kind, UnreadableError
from attention_predictor.offload.config import OffloadConfig

FIELDS: dict[str, Field[Any]] = {one.name: one for one in fields(OffloadConfig)}


def add_setting_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add an option for each setting, or for those named."""
    group = parser.add_argument_group("settings of the cache")
    for name in names or FIELDS:
        kind, default = FIELDS[name].metadata["kind"], FIELDS[name].default
        option, says = "--" + name.replace("_", "-"), FIELDS[name].metadata["help"].replace("%", "%%")
        if kind.of == "bool":
            group.add_argument(option, action="store_true", help=says)
            continue
        shown = "" if default in (None, ()) else " (%(default)s)"
        group.add_argument(option, type=reader(kind), default=default, metavar=kind.metavar, help=says + shown)


def offload_config(args: argparse.Namespace, **changes: Any) -> OffloadConfig:
    """The settings from ``add_setting_arguments``; ``ConfigError`` for a value that is not allowed."""
    given = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    return OffloadConfig(**given | changes)


def read_setting(name: str, text: str) -> Any:
    """Parse a setting's value; ``ConfigError`` for an invalid value or an unknown name."""
    if name not in FIELDS:
        near = get_close_matches(name, FIELDS, n=1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown field {name!r}{meant}; expected one of {', '.join(FIELDS)}")
    kind = FIELDS[name].metadata["kind"]
    try:
        return kind.read(text)
    except UnreadableError as error:
        raise ConfigError(f"{name} {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not of type {kind.of}: expected {kind.allowed}") from error


def reader(kind: Kind) -> Callable[[str], Any]:
    """A parse function, for argparse's ``type``."""

    def read(text: str) -> Any:
        try:
            return kind.read(text)
        except UnreadableError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    read.__name__ = kind.of  # argparse shows it in its errors
    return read
