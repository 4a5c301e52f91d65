"""The structs that Python passes to kernels: fields declared, and compared with the header's by the compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

Fields = Sequence[tuple[str, Any]]
# What a field must be in C++, given its type there.
KINDS = {
    ctypes.c_void_p: "is_pointer<{}>",
    ctypes.c_int64: "same<{}, int64_t>",
    ctypes.c_double: "same<{}, double>",
}


def pointers(names: str) -> Fields:
    """Addresses of these names."""
    return [(name, ctypes.c_void_p) for name in names.split()]


def integers(names: str) -> Fields:
    """64-bit integers of these names."""
    return [(name, ctypes.c_int64) for name in names.split()]


def doubles(names: str) -> Fields:
    """Doubles of these names."""
    return [(name, ctypes.c_double) for name in names.split()]


def takes(function: str, struct: type[ctypes.Structure]) -> str:
    """C++ that compiles where a function takes a pointer to the struct of that name, and returns an int."""
    expected = f"same<decltype(&{function}), int (*)(const {struct.__name__} *)>"
    return f'static_assert({expected}, "{function} does not take {struct.__name__} alone");\n'


def assertions(struct: type[ctypes.Structure]) -> str:
    """C++ that compiles where the struct of that name has the same fields in the same order; else it names one."""
    name, before, named, kinds = struct.__name__, "", [], []
    for field, kind in getattr(struct, "_fields_"):  # noqa: B009 (mypy knows of no such attribute)
        if issubclass(kind, ctypes.Structure):
            before += assertions(kind)
        expected = KINDS.get(kind, f"same<{{}}, {kind.__name__}>").format(f"decltype({name}::{field})")
        kinds.append(f'static_assert({expected}, "{name}.{field} is something else in Python");')
        named.append(f"    .{field} = {{}},")
    whole = [f"static_assert(sizeof({name}{{", *named, f'}}) == {ctypes.sizeof(struct)}, "{name} has more fields");']
    return "\n".join([before, *whole, *kinds, ""])
