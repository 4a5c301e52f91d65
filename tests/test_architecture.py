"""Who may import whom: read from every module's import statements, those for type checkers and within functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import attention_predictor

PACKAGE = "attention_predictor"
Edge = tuple[str, str]  # module, and a module that it imports; both without the package's name

# What anyone may use. They know one another alone.
HELPERS = {
    *(
        "arithmetic",
        "documents",
        "errors",
        "figures",
        "gguf_file",
        "kinds",
        "launcher",
        "lazy",
        "parser",
        "progress",
        "reading",
    ),
    *("sizes", "writing"),
}
LIBRARY = HELPERS | {"csrc", "predictor", "offload"}
OPTIONS = {"settings", "arguments", "loading"}  # a command line's: they know the settings
# By part, a folder or a module at the root: the parts that it may import beside itself. ``commands`` declare options,
# which those who carry commands out read; ``""`` is the package itself, of which the version is read.
PARTS: dict[str, set[str]] = {
    **dict.fromkeys(HELPERS, HELPERS),
    "csrc": HELPERS,
    "predictor": HELPERS | {"csrc"},
    "offload": LIBRARY,
    **dict.fromkeys(OPTIONS, LIBRARY | OPTIONS),
    "train": LIBRARY | OPTIONS | {"commands"},
    "eval": LIBRARY | OPTIONS | {"commands", ""},
    "commands": LIBRARY | OPTIONS | {"train", "eval"},
    "generate": LIBRARY | OPTIONS | {"commands"},
    "cli": HELPERS | {"commands", ""},
    "": LIBRARY,
}
# The same within offload/, whose root modules come in two kinds.
BASE = {"config", "stats", "policy_names", "chunk", "ranks"}
MIDDLE = {"blocks", "attention"}
OFFLOAD: dict[str, set[str]] = {
    "": set(),
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(MIDDLE, BASE),
    "policies": BASE | MIDDLE,
    "stage": BASE | MIDDLE,
    "runtime": BASE | MIDDLE | {"stage"},
    "step": BASE | MIDDLE | {"policies", "runtime"},
    **dict.fromkeys(
        ("hf", "engine", "generation", "inputs", "requests"),
        BASE | MIDDLE | {"policies", "stage", "runtime", "step", "hf", "engine", "generation", "inputs", "requests"},
    ),
}

# The same within eval/: each folder may import itself and those named.
EVAL: dict[str, set[str]] = {
    "": set(),
    "display": set(),
    "harness": {"display"},
    "benchmarks": {"harness", "display"},
    "report": {"benchmarks", "harness", "display"},
    "bench": {"harness", "display"},
    "analysis": {"harness", "display"},
}
WITHIN = {"offload": OFFLOAD, "eval": EVAL}


def sources(folder: Path, name: str = "") -> Iterator[tuple[str, str]]:
    """Every module below a folder, by its dotted name without the package's, and its text."""
    for path in sorted(folder.iterdir()):
        own = f"{name}.{path.stem}".lstrip(".")
        if path.is_dir() and (path / "__init__.py").exists():  # links to the folders at the top, too
            yield from sources(path, own)
        elif path.name == "__init__.py":
            yield name, path.read_text("utf-8")
        elif path.suffix == ".py":
            yield own, path.read_text("utf-8")


def imports(texts: Mapping[str, str]) -> set[Edge]:
    """All imports among the modules; of a package's name that is a module, it is that module which is imported."""
    found = set()
    for module, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names.append(whole if _own(whole) in texts else str(node.module))
            for name in names:
                if (own := _own(name)) is not None:
                    assert own in texts, f"{module} imports {name}, which is no module"
                    found.add((module, own))
    return found


def _own(name: str) -> str | None:
    """The name without the package's; ``None`` for other packages."""
    if name == PACKAGE:
        return ""
    return name.removeprefix(f"{PACKAGE}.") if name.startswith(f"{PACKAGE}.") else None


def out_of_order(edges: set[Edge]) -> set[Edge]:
    """Imports that ``PARTS`` or ``WITHIN`` does not allow."""
    found = set()
    for edge in edges:
        (one, inner), (other, other_inner) = (_parts(module) for module in edge)
        if other != one:
            allowed = other in PARTS[one]
        elif one in WITHIN:
            allowed = other_inner == inner or other_inner in WITHIN[one][inner]
        else:
            allowed = True
        if not allowed:
            found.add(edge)
    return found


def _parts(module: str) -> tuple[str, str]:
    """The first two parts of a dotted name, empty where there are fewer."""
    one, _, rest = module.partition(".")
    return one, rest.partition(".")[0]


def circular(edges: set[Edge]) -> set[Edge]:
    """Imports that lie on a circle: what is left once modules that import nothing, or that none imports, are gone."""
    left = set(edges)
    while True:
        inner = {one for one, _ in left} & {other for _, other in left}
        kept = {edge for edge in left if inner.issuperset(edge)}
        if kept == left:
            break
        left = kept
    return {(one, other) for one, other in left if one in _reached(other, left)}


def _reached(start: str, edges: set[Edge]) -> set[str]:
    reached, ahead = {start}, [start]
    while ahead:
        module = ahead.pop()
        more = {other for one, other in edges if one == module} - reached
        reached |= more
        ahead.extend(more)
    return reached


@pytest.fixture(scope="module")
def edges() -> set[Edge]:
    folder = Path(attention_predictor.__file__).parent
    texts = dict(sources(folder))
    assert {"", "errors", "csrc.ops", "predictor.scores", "offload.hf.layer", "train.fit", "eval.harness.runner"} <= {
        *texts
    }
    return imports(texts)


def test_every_part_has_its_place(edges: set[Edge]) -> None:
    parts = {_parts(module) for edge in edges for module in edge}
    assert {one for one, _ in parts} <= {*PARTS}
    for whole, folders in WITHIN.items():
        assert {inner for one, inner in parts if one == whole} <= {*folders}


def test_imports_go_one_way(edges: set[Edge]) -> None:
    assert sorted(out_of_order(edges)) == []


def test_no_circles(edges: set[Edge]) -> None:
    assert sorted(circular(edges)) == []


def test_no_merge_conflict_is_left() -> None:
    patterns = ("*.md", "docs/*.md", "*/*.py", "*/*/*.py", "scripts/*")
    for path in (path for pattern in patterns for path in Path(__file__).parents[1].glob(pattern) if path.is_file()):
        lines = path.read_bytes().splitlines()
        assert not [line for line in lines if line.startswith((b"<<<<<<< ", b">>>>>>> "))], path
