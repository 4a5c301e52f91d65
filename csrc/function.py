"""Functions for CPUs: declared in Python, compiled when they are first needed, called by ctypes.

A ``.cpp`` file holds them. Each takes one struct, which its operation's Python module fills in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from attention_predictor.csrc.build import cpu_library
from attention_predictor.csrc.layout import assertions, equal, takes


class Function:
    """A C++ function; a library by itself.

    Args:
        source: Its file, beside this module.
        name: How it is called; it takes a pointer to the struct, and returns 0, or 1 for an unknown type of elements.
        struct: The struct, as in the header that the file includes.
        constants: Of the source, by name, with the values that Python counts on.
    """

    def __init__(
        self,
        source: str,
        name: str,
        struct: type[ctypes.Structure],
        constants: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.source, self.name, self.struct, self.constants = source, name, struct, constants
        self._loaded: Callable[[object], int] | None = None

    @property
    def text(self) -> str:
        """Its program: the source, and assertions that function, struct and constants are as Python has them."""
        checks = assertions(self.struct), takes(self.name, self.struct), equal(self.constants)
        return "\n".join([f'#include "{self.source}"', *checks])

    def load(self) -> Callable[[object], int]:
        """Compile it, unless that has been done before; ``BuildError`` where it can't be."""
        if self._loaded is None:
            self._loaded = getattr(cpu_library(self.source, self.text), self.name)
        return self._loaded

    def call(self, arguments: ctypes.Structure) -> None:
        """Run it.

        Raises:
            BuildError: It can't be compiled.
            RuntimeError: It refuses the arguments.
        """
        if self.load()(ctypes.byref(arguments)):
            raise RuntimeError(f"{self.name} on a CPU: unknown type of elements")


def load(functions: Sequence[Function]) -> None:
    """Compile functions, those that are not kept on disk in parallel; ``BuildError`` where one can't be."""
    with ThreadPoolExecutor(len(functions)) as pool:
        list(pool.map(Function.load, functions))
