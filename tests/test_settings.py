"""Settings declared once: validated, options of a command line, fields of a rule."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from attention_predictor.cli import main, make_parser
from attention_predictor.errors import ConfigError
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.kinds import Kind
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.settings import FIELDS, add_setting_arguments, offload_config, read_setting

# A value of each setting that is not its default, as text and as it is kept.
GIVEN = {
    "budget": ("512", 512),
    "budget_allocation": ("256+768", [256, 768]),
    "block_size": ("32", 32),
    "sink": ("128", 128),
    "recent": ("32", 32),
    "history": ("16", 16),
    "policy": ("quest", "quest"),
    "predictor": ("ema", "ema"),
    "calibration": ("exact", "exact"),
    "calibration_interval": ("7", 7),
    "sketch_bits": ("4", 4),
    "late_fetch": ("1", 1.0),
    "reserve": ("0", 0.0),
    "prefetch": ("graph", "graph"),
    "compile": ("True", True),
    "unfused": ("True", True),
    "kernels": ("none", "none"),
    "skip_layers": ("0+1", [0, 1]),
    "slab_blocks": ("8", 8),
    "host_memory": ("1.5GiB", 3 << 29),
    "measure_recovery": ("2", 2),
}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_setting_arguments(parser)
    return parser.parse_args(arguments)


def test_every_setting_says_what_it_means_and_what_is_allowed() -> None:
    assert GIVEN.keys() == FIELDS.keys()
    for one in fields(OffloadConfig):
        kind = one.metadata["kind"]
        assert isinstance(kind, Kind)
        assert one.metadata["help"]
        assert kind.expected(one.default) is None


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_an_option_and_a_field_of_a_rule(name: str) -> None:
    text, value = GIVEN[name]
    assert read_setting(name, text) == value
    if name != "policy":
        assert Rule.parse(f"a: predictor,{name}={text}").settings == {"policy": "predictor", name: value}
    option = "--" + name.replace("_", "-")
    given = (option,) if isinstance(value, bool) else (option, text.replace("+", ","))
    changes = {"budget": 512} if name == "budget_allocation" else {}
    assert getattr(offload_config(parsed(*given), **changes), name) == value


def test_without_options_all_is_default() -> None:
    assert offload_config(parsed()) == OffloadConfig()
    assert OffloadConfig().prefetch == "auto"


@pytest.mark.parametrize("prefetch", ["auto", "graph"])
def test_steps_that_can_be_captured_can_be_compiled(prefetch: str) -> None:
    assert OffloadConfig(prefetch=prefetch, compile=True).compile
    with pytest.raises(ConfigError, match="compile=True is not allowed: expected False, but with prefetch='auto' or"):
        OffloadConfig(prefetch="thread", compile=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("false", False), ("no", False), ("0", False), ("True", True), ("yes", True), ("1", True)],
)
def test_false_is_false(text: str, value: bool) -> None:
    assert Rule.parse(f"predictor,compile={text}").settings["compile"] is value


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("predictor,compile=maybe", "compile='maybe' is not of type bool: expected True or False"),
        ("predictor,compile=", "compile='' is not of type bool"),
        ("predictor,compile", "'compile' has no value, expected field=value"),
        ("predictor,budget=big", "budget='big' is not of type int"),
        ("predictor,budget=1.5", "budget='1.5' is not of type int"),
        ("predictor,late_fetch=x", "late_fetch='x' is not of type float: expected a share from 0 to 1"),
        ("predictor,skip_layers=0+x", "skip_layers '0,x': expected numbers"),
        ("predictor,host_memory=1XB", "host_memory='1XB' is not of type int: expected a positive number of bytes"),
        ("predictor,host_memory=infGiB", "host_memory='infGiB' is not of type int"),
        ("predictor,bugdet=512", "unknown field 'bugdet', did you mean 'budget'?"),
        ("predictor,sink=64,sink=32", "sink is given twice"),
        ("predictor,policy=quest", "policy is given twice"),
    ],
)
def test_a_rule_names_the_field_that_is_wrong(rule: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Rule.parse(rule)
    assert str(caught.value).startswith(f"--rule {rule!r}: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"skip_layers": [-1]}, "skip_layers=[-1] is not allowed: expected layer numbers from 0 on"),
        ({"host_memory": -5}, "host_memory=-5 is not allowed: expected a positive number of bytes, or None"),
        ({"host_memory": True}, "host_memory=True is not allowed"),
        ({"compile": 1}, "compile=1 is not allowed: expected True or False"),
        ({"sketch_bits": 2.0}, "sketch_bits=2.0 is not allowed: expected one of 1, 2, 4, 8"),
        ({"late_fetch": "0.5"}, "late_fetch='0.5' is not allowed: expected a share from 0 to 1"),
        ({"late_fetch": False}, "late_fetch=False is not allowed"),
        ({"kernels": None}, "kernels=None is not allowed: expected one of auto, none"),
        ({"slab_blocks": 0}, "slab_blocks=0 is not allowed: expected at least 1"),
    ],
)
def test_values_that_are_not_allowed(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OffloadConfig(**changes)
    assert str(caught.value).startswith(said)


def test_generate_takes_all_of_them() -> None:
    args = make_parser().parse_args(["generate", "--skip-layers", "0,1", "--host-memory", "2GiB", "--kernels", "none"])
    assert (args.skip_layers, args.host_memory, args.kernels) == ([0, 1], 2 << 30, "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--skip-layers", "first"), "argument --skip-layers: 'first': expected numbers separated by commas"),
        (("--host-memory", "much"), "argument --host-memory: invalid int value: 'much'"),
        (("--compile", "--prefetch", "thread"), "compile=True is not allowed: expected False, but with prefetch="),
    ],
)
def test_the_command_line_refuses(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["generate", "--prompt", "x", *arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"attnpred generate: {said}")
