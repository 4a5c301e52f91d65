"""Settings declared once: validated, options of a command line, fields of a rule."""

from __future__ import annotations

import argparse
import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from attention_predictor.cli import main, make_parser
from attention_predictor.errors import ConfigError, SettingError
from attention_predictor.eval.harness.rules import Rule
from attention_predictor.kinds import Kind
from attention_predictor.offload.config import GROUPS, OffloadConfig
from attention_predictor.offload.policy_names import BUILT_IN
from attention_predictor.settings import FIELDS, add_setting_arguments, offload_config, option_of, read_setting

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

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
    "reserve_ahead": ("0.25", 0.25),
    "prefetch": ("graph", "graph"),
    "compile": ("yes", True),
    "unfused": ("True", True),
    "kernels": ("none", "none"),
    "skip_layers": ("0+1", [0, 1]),
    "slab_blocks": ("8", 8),
    "host_kv": ("int8", "int8"),
    "host_memory": ("1.5GiB", 3 << 29),
    "measure_recovery": ("2", 2),
}

# Of each setting a value of a wrong type, one out of range, and what a line must then say is allowed; as text for a
# command line and a rule, and as a value in Python. ``None`` stands for a text where any text is of the right type.
MULTIPLE = "a multiple of block_size=16"
REFUSED: dict[str, tuple[tuple[str | None, object, str], tuple[str | None, object, str]]] = {
    "budget": (("big", 1.5, "an integer"), ("100", 100, "at least sink + recent + one block = 64 + 64 + 16 = 144")),
    "budget_allocation": (("256+x", 7, "a budget for each layer"), ("256+256", [256, 256], "a total of 2 × 1024")),
    "block_size": (("16.0", 16.0, "an integer, a power of two"), ("12", 12, "a power of two")),
    "sink": (("x", 2**70, "an integer, at least 0"), ("10", 10, MULTIPLE)),
    "recent": (("1e2", 64.0, "an integer, at least 0"), ("-16", -16, "at least 0")),
    "history": (("x", None, "an integer, at least 1"), ("0", 0, "at least 1")),
    "policy": ((None, 3, "one of full, streaming"), ("best", "best", "one of full, streaming")),
    "predictor": ((None, 3, "a name or a directory"), ("", "", "a name or a directory")),
    "calibration": ((None, None, "one of sketch, exact, none"), ("no", "no", "one of sketch, exact, none")),
    "calibration_interval": (("5.0", 5.0, "an integer, at least 1"), ("0", 0, "at least 1")),
    "sketch_bits": (("two", 2.0, "one of 1, 2, 4, 8"), ("3", 3, "one of 1, 2, 4, 8")),
    "late_fetch": (("x", "0.5", "a share from 0 to 1, or auto"), ("1.5", 1.5, "a share from 0 to 1, or auto")),
    "reserve_ahead": (("1.5", 1.5, "a share from 0 to 1"), ("-1", -1, "a share from 0 to 1")),
    "reserve": (("half", True, "a share from 0 on"), ("-1", 10**400, "a share from 0 on")),
    "prefetch": ((None, True, "one of auto, thread, graph, none"), ("gpu", "gpu", "one of auto, thread, graph, none")),
    "compile": (("maybe", 1, "True or False"), ("2", 2, "True or False")),
    "unfused": (("", "False", "True or False"), ("-1", None, "True or False")),
    "kernels": ((None, None, "one of auto, none"), ("triton", "triton", "one of auto, none")),
    "skip_layers": (("first", "0", "layer numbers from 0 on"), ("-1", [-1], "layer numbers from 0 on")),
    "host_kv": ((None, None, "one of auto, int8, int4"), ("int2", "fp8", "one of auto, int8, int4")),
    "slab_blocks": (("many", 8.5, "an integer, at least 1"), ("0", 0, "at least 1")),
    "host_memory": (("1XB", "1GiB", "a positive number of bytes, or None"), ("0", 0, "a positive number of bytes")),
    "measure_recovery": (("all", False, "an integer, 0 (never), or n"), ("-2", -2, "0 (never), or n for every n-th")),
}
CASES = [(name, *case) for name, both in REFUSED.items() for case in both]
TEXTS = [case for case in CASES if case[1] is not None]


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
        assert one.metadata["group"] in GROUPS
        assert kind.expected(one.default) is None


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_an_option_and_a_field_of_a_rule(name: str) -> None:
    text, value = GIVEN[name]
    assert read_setting(name, text) == value
    if name != "policy":
        assert Rule.parse(f"a: predictor,{name}={text}").settings == {"policy": "predictor", name: value}
    changes = {"budget": 512} if name == "budget_allocation" else {}
    assert getattr(offload_config(parsed(option_of(name), text.replace("+", ",")), **changes), name) == value
    if isinstance(value, bool):
        assert getattr(offload_config(parsed(option_of(name))), name) is True
        assert getattr(offload_config(parsed(option_of(name), "no")), name) is False


class TestWhatIsNotAllowed:
    """One line names the setting, the value and what is allowed, by whichever way it is given."""

    @pytest.mark.parametrize(("name", "text", "value", "allowed"), CASES)
    def test_in_python(self, name: str, text: str | None, value: object, allowed: str) -> None:
        with pytest.raises(SettingError) as caught:
            OffloadConfig(**{name: value})
        line = str(caught.value)
        assert line.startswith(f"{name}={value!r} is not allowed: expected ")
        assert allowed in line
        assert str(pickle.loads(pickle.dumps(caught.value))) == line

    @pytest.mark.parametrize(("name", "text", "value", "allowed"), TEXTS)
    def test_by_a_rule(self, name: str, text: str, value: object, allowed: str) -> None:
        rule = f"mine: {text}" if name == "policy" else f"mine: predictor,{name}={text}"
        with pytest.raises(ConfigError) as caught:
            Rule.parse(rule).config(1024)
        line = str(caught.value)
        # What only other fields forbid is found out when the whole rule has been read.
        assert line.startswith((f"--rule {rule!r}: {name}={text!r} is", f"rule 'mine': {name}={value!r} is"))
        assert allowed in line

    @pytest.mark.parametrize(("name", "text", "value", "allowed"), TEXTS)
    def test_by_an_option(
        self, name: str, text: str, value: object, allowed: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = text.replace("+", ",")
        assert main(["generate", "--prompt", "x", option_of(name), given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        said = given or "''"
        assert line.startswith(f"attnpred generate: {option_of(name)} {said}: expected ")
        assert allowed in line


def test_all_of_them_are_tried_with_wrong_values() -> None:
    assert REFUSED.keys() == FIELDS.keys()


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
        ("predictor,compile=", "compile='' is not allowed: expected True or False"),
        ("predictor,compile", "'compile' has no value, expected field=value"),
        ("predictor,skip_layers=0+x", "skip_layers='0+x' is not allowed: expected layer numbers"),
        ("predictor,host_memory=infGiB", "host_memory='infGiB' is not allowed: expected a positive number of bytes"),
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
    "changes", [{"host_memory": True}, {"late_fetch": False}, {"late_fetch": float("nan")}, {"skip_layers": [True]}]
)
def test_a_bool_is_no_number_and_neither_is_nan(changes: dict[str, object]) -> None:
    with pytest.raises(SettingError, match="is not allowed: expected"):
        OffloadConfig(**changes)


def test_generate_takes_all_of_them() -> None:
    args = make_parser().parse_args(["generate", "--skip-layers", "0,1", "--host-memory", "2GiB", "--kernels", "none"])
    assert (args.skip_layers, args.host_memory, args.kernels) == ([0, 1], 2 << 30, "none")


def test_an_option_that_another_one_forbids(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--compile", "--prefetch", "thread"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "attnpred generate: --compile True: expected False, but with prefetch='auto' or 'graph'"


def test_the_docstring_has_every_setting_in_its_group() -> None:
    """In the order of the declaration, so that the page made from both (docs/configuration.md) reads as they do."""
    lines = inspect.getdoc(OffloadConfig).splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if heading := re.fullmatch(r"(\w+): (.+)\.", line):
            group = heading[1].lower()
            assert heading[2] == GROUPS[group]
            found[group] = []
        elif (entry := re.match(r" {4}(\w+): ", line)) and entry[1] in FIELDS:
            found[group].append(entry[1])
    declared = {group: [name for name, one in FIELDS.items() if one.metadata["group"] == group] for group in GROUPS}
    assert found == declared
    assert list(FIELDS) == [name for names in declared.values() for name in names]


def test_the_page_is_what_the_declaration_says() -> None:
    """In a process of its own: policies that tests register are not on the page."""
    command = [sys.executable, str(SCRIPTS / "document_settings.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (SCRIPTS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, one in FIELDS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        _, _, kind, default, allowed, option, meaning, _ = re.split(r"(?<!\\) ?\| ?", row)
        assert kind.replace("\\|", "|") == f"`{one.type}`"
        assert default == f"`{one.default!r}`"
        assert (f"one of {', '.join(BUILT_IN)}" if name == "policy" else one.metadata["kind"].allowed) in allowed
        assert option.split()[0].strip("`") == option_of(name)
        assert len(meaning.split()) > 3
