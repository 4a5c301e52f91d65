"""GgufFile: a model in one GGUF file, known by its header.

A model's name that ends in ``.gguf`` is the path of such a file, or of one in a repository of the hub:
``owner/name/model-Q4_K_M.gguf``. The layout of the header is that of GGUF 2 and 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, metadata, tensors; numbers are
little-endian. transformers reads the file itself, but its errors about a bad file come late and don't name the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_predictor.errors import CheckpointError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
NEEDED = ("gguf", "accelerate")  # packages that transformers needs to read these files
ALIGNMENT = 32  # bytes, unless the metadata gives another
CHUNK_BYTES = 1 << 24

# By ggml's numbers of tensor types: what holds numbers, not blocks of a quantisation.
FLOAT_TYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
OF_BLOCKS = "bfloat16"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, here or on the hub."""
    return Path(name).suffix.lower() == SUFFIX


def gguf_files(folder: Path) -> list[str]:
    """Names of the GGUF files in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX)


def check_packages(name: str) -> None:
    """Raise ``CheckpointError`` if a package is missing that transformers needs to read GGUF."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"{name!r} is a model in GGUF, which needs the package {package}: "
                "pip install 'attention-predictor[gguf]'"
            )


def hub_parts(name: str) -> tuple[str, str] | None:
    """Repository and file of ``owner/name/file.gguf``; ``None`` if it can't be one of the hub."""
    parts = name.split("/")
    return ("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 and all(parts) and parts[0] != "." else None


@dataclass(frozen=True)
class GgufFile:
    """The content of a file's header.

    Attributes:
        path: Where it is.
        architecture: The model's, under llama.cpp's name: ``llama``, ``qwen2``, ….
        has_tokenizer: Whether it brings its tokens.
        dtype: Of the numbers it holds (its norms are float32, whatever the rest); bfloat16 where it holds blocks.
    """

    path: Path
    architecture: str
    has_tokenizer: bool
    dtype: str

    @classmethod
    def read(cls, path: Path) -> GgufFile:
        """Read the file's header; every tensor must lie within the file.

        Raises:
            CheckpointError: It can't be read, is none, of another version, one part of several, or cut short.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(len(MAGIC))
                if start != MAGIC:
                    found = "it is empty" if not size else f"it begins with {start!r}, not with {MAGIC!r}"
                    raise CheckpointError(f"{str(path)!r} is not a GGUF file: {found}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls._parse(path, size, _Reader(data))
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} can't be read: {error.strerror or error}") from error
        except struct.error as error:
            raise CheckpointError(f"{str(path)!r} is cut short: its {size} bytes end within the header") from error
        except _DamagedError as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error

    @classmethod
    def _parse(cls, path: Path, size: int, reader: _Reader) -> GgufFile:
        version = reader.number("I")
        if version not in VERSIONS:
            allowed = " and ".join(map(str, VERSIONS))
            raise CheckpointError(f"{str(path)!r} is of GGUF version {version}: {allowed} are supported, little-endian")
        tensors, entries = reader.number("Q"), reader.number("Q")
        known: dict[str, Any] = {}
        for _ in range(entries):
            key, kind = reader.string(), reader.number("I")
            known[key] = reader.value(kind)
        alignment, parts = known.get("general.alignment", ALIGNMENT), known.get("split.count", 0)
        if not isinstance(alignment, int) or alignment < 1:
            raise _DamagedError(f"general.alignment is {alignment!r}")
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{str(path)!r} is one of {parts} parts: join them by llama.cpp's `llama-gguf-split --merge` first"
            )
        architecture = known.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{str(path)!r} names no architecture (general.architecture)")
        end, types = reader.tensors(tensors, alignment)
        if end > size:
            raise CheckpointError(f"{str(path)!r} is cut short: its tensors need {end} bytes, the file has {size}")
        names = [name for kind, name in FLOAT_TYPES.items() if kind in types]
        dtype = names[-1] if names and types <= FLOAT_TYPES.keys() else OF_BLOCKS
        return cls(path, architecture, "tokenizer.ggml.tokens" in known, dtype)

    def describe(self) -> dict[str, Any]:
        """Identifies the file: name, size in bytes, and sha256 of its content."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return {"file": self.path.name, "bytes": self.path.stat().st_size, "sha256": digest.hexdigest()}


class _DamagedError(Exception):
    """Invalid content of a header; the message says what is invalid."""


class _Reader:
    """Reads a header sequentially; ``struct.error`` if the file ends before it."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._place = data, len(MAGIC)

    def number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def string(self) -> str:
        length = self.number("Q")
        start = self._skip(length)
        try:
            return self._data[start : self._place].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError("its header holds a name that is no UTF-8") from error

    def value(self, kind: int) -> Any:
        """A value of metadata; of an array, ``None``: none that matters here is one."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _DamagedError(f"its header holds a value of the unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            self._skip(length * struct.calcsize(_NUMBERS[inner]))
            return None
        for _ in range(length):
            if inner == _STRING:
                self._skip(self.number("Q"))
            else:
                self.value(inner)
        return None

    def tensors(self, count: int, alignment: int) -> tuple[int, set[int]]:
        """Bytes of the file up to the end of its last tensor, and the types of all of them.

        A tensor of a type that the package ``gguf`` doesn't know counts as empty: transformers refuses it.
        """
        from gguf.constants import GGML_QUANT_SIZES  # a slow import that only these files need

        blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        furthest, types = 0, set()
        for _ in range(count):
            self._skip(self.number("Q"))
            shape = self._numbers("Q", self.number("I"))
            types.add(kind := self.number("I"))
            elements, block_bytes = blocks.get(kind, (1, 0))
            furthest = max(furthest, self.number("Q") + math.prod(shape) // elements * block_bytes)
        return -(-self._place // alignment) * alignment + furthest, types

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        found = struct.unpack_from(layout, self._data, self._place)
        self._place += struct.calcsize(layout)
        return found

    def _skip(self, size: int) -> int:
        start, self._place = self._place, self._place + size
        if self._place > len(self._data):
            raise struct.error("past the end")
        return start
