"""Provenance of results: versions, git state, machine."""

from __future__ import annotations

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
    """What run.json keeps of a model besides its name and dtype: of a GGUF file its size and checksum, as ``gguf``.

    Raises:
        CheckpointError: The file can't be had, or is damaged.
    """
    file = gguf_file(name)
    return {} if file is None else {"gguf": file.describe()}


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
