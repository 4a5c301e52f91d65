"""``OffloadConfig``'s settings as text: command-line options, and fields of a rule."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from difflib import get_close_matches
from typing import Any

from attention_predictor.arguments import add_option, refused
from attention_predictor.errors import ConfigError, SettingError
from attention_predictor.kinds import NotAllowedError
from attention_predictor.offload.config import GROUPS, OffloadConfig

FIELDS: dict[str, Field[Any]] = {one.name: one for one in fields(OffloadConfig)}


def option_of(name: str) -> str:
    """The name of a setting's command-line option."""
    return "--" + name.replace("_", "-")


def add_setting(parser: argparse._ActionsContainer, name: str, *, default: Any = None, says: str | None = None) -> None:
    """The option of a setting.

    Args:
        default: In place of the field's own.
        says: Help in place of the field's own, where a command uses the setting for something else.
    """
    one = FIELDS[name]
    default = one.default if default is None else default
    add_option(parser, option_of(name), one.metadata["kind"], default, says or one.metadata["help"])


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all settings, in their groups."""
    for group, what in GROUPS.items():
        place = parser.add_argument_group(f"{group}: {what}")
        for name, one in FIELDS.items():
            if one.metadata["group"] == group:
                add_setting(place, name)


def offload_config(args: argparse.Namespace, **changes: Any) -> OffloadConfig:
    """The settings from parsed options; ``ConfigError`` names an option whose value is not allowed.

    Args:
        changes: Settings that no option gives, or in place of those that options give.
    """
    given = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    try:
        return OffloadConfig(**given | changes)
    except SettingError as error:
        if error.name in changes or error.name not in given:
            raise
        raise refused(option_of(error.name), _written(error.found), error.expected) from error


def read_setting(name: str, text: str) -> Any:
    """Parse a setting's value; ``ConfigError`` for a value that is not allowed or an unknown setting."""
    if name not in FIELDS:
        near = get_close_matches(name, FIELDS, n=1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown field {name!r}{meant}; expected one of {', '.join(FIELDS)}")
    try:
        return FIELDS[name].metadata["kind"].parse(text)
    except NotAllowedError as error:
        raise SettingError(name, text, str(error)) from error


def _written(value: object) -> str:
    """A value as it is given to an option."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
