"""C++ assertions that structs, functions and constants are the same in Python and in C++."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

Fields = Sequence[tuple[str, Any]]
# The C++ condition for each ctypes type of a field.
KINDS = {
    ctypes.c_void_p: "is_pointer<{}>",
    ctypes.c_int64: "same<{}, int64_t>",
    ctypes.c_double: "same<{}, double>",
}


def pointers(names: str, of: str | None = None) -> Fields:
    """Pointer fields with these names; ``of`` is the C++ type they point to, ``None``: any."""
    return [(name, ctypes.c_void_p if of is None else _pointer_to(of)) for name in names.split()]


@functools.cache
def _pointer_to(of: str) -> type[ctypes.c_void_p]:
    return type(f"pointer to {of}", (ctypes.c_void_p,), {"of": of})


def integers(names: str) -> Fields:
    """64-bit integer fields with these names."""
    return [(name, ctypes.c_int64) for name in names.split()]


def doubles(names: str) -> Fields:
    """Double fields with these names."""
    return [(name, ctypes.c_double) for name in names.split()]


def takes(function: str, struct: type[ctypes.Structure]) -> str:
    """C++ that compiles only if the function takes a pointer to this struct and returns an int."""
    expected = f"same<decltype(&{function}), int (*)(const {struct.__name__} *)>"
    return f'static_assert({expected}, "{function} does not take {struct.__name__} alone");\n'


def assertions(struct: type[ctypes.Structure]) -> str:
    """C++ that compiles only if the C++ struct has the same fields in the same order; else the error names one."""
    name, before, named, kinds = struct.__name__, "", [], []
    for field, kind in getattr(struct, "_fields_"):  # noqa: B009 (mypy knows of no such attribute)
        if issubclass(kind, ctypes.Structure):
            before += assertions(kind)
        of = getattr(kind, "of", None)  # of a pointer
        other = f"same<{{}}, {kind.__name__}>" if of is None else f"points_to<{{}}, {of}>"
        expected = KINDS.get(kind, other).format(f"decltype({name}::{field})")
        kinds.append(f'static_assert({expected}, "{name}.{field} is something else in Python");')
        named.append(f"    .{field} = {{}},")
    whole = [f"static_assert(sizeof({name}{{", *named, f'}}) == {ctypes.sizeof(struct)}, "{name} has more fields");']
    return "\n".join([before, *whole, *kinds, ""])


def equal(constants: Mapping[str, int]) -> str:
    """C++ that compiles only if these constants have these values."""
    return "".join(
        f'static_assert({name} == {value}, "{name} is not {value}, as in Python");\n'
        for name, value in constants.items()
    )
