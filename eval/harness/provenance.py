"""Provenance of results: versions, git state, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from attention_predictor import __version__
from attention_predictor.loading import gguf_file

PLACES, PIECE = 64, 1 << 16  # of a file of weights: places that are read, and bytes at each
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "jieba", "gguf")


def describe_session(processes: int) -> dict[str, Any]:
    """A session's entry in run.json."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "processes": processes,
        "versions": _versions(),
        "git": git_state(Path(__file__).resolve()),
        "machine": _machine(),
    }


def describe_model(name: str) -> dict[str, Any]:
    """What run.json keeps of a model besides its name and dtype.

    Of a GGUF file its size and checksum, as ``gguf``. Of a directory a digest, ``weights``: of its configuration,
    of the sizes of its weights' files, and of places in them.

    Raises:
        CheckpointError: The file can't be had, or is damaged.
    """
    file = gguf_file(name)
    if file is not None:
        return {"gguf": file.describe()}
    return {"weights": _digest(Path(name))} if Path(name).is_dir() else {}


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name != "config.json" and path.suffix not in (".safetensors", ".bin"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(PLACES):
                file.seek(place * size // PLACES)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that ``file`` belongs to, and whether tracked files were changed; ``None`` for a file
    that no checkout tracks, such as an installed one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}


def _versions() -> dict[str, str]:
    found = {"attention-predictor": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not needed by every benchmark
    return found


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }
