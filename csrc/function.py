"""CPU functions: declared in Python, compiled at first use, called by ctypes.

A ``.cpp`` file has the functions. Each takes one struct, which its operation's Python module fills in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from attention_predictor.csrc.build import cpu_library
from attention_predictor.csrc.layout import assertions, equal, takes


class Function:
    """A C++ function; compiled as its own library.

    Args:
        source: The file, in this folder.
        name: Its name. It takes a pointer to the struct, and returns 0, or 1 for an unknown element type.
        struct: The struct, as in the header that the file includes.
        constants: Constants of the source and the values that Python relies on.
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
        """The program: the source, and assertions that function, struct and constants match Python's."""
        checks = assertions(self.struct), takes(self.name, self.struct), equal(self.constants)
        return "\n".join([f'#include "{self.source}"', *checks])

    def load(self) -> Callable[[object], int]:
        """Compile it if needed; ``BuildError`` if that fails."""
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
    """Compile functions in parallel, unless cached on disk; ``BuildError`` if one fails."""
    with ThreadPoolExecutor(len(functions)) as pool:
        list(pool.map(Function.load, functions))
