"""FusedModules: runs a model's norms, MLPs and rotary embeddings as kernels, during captured steps only."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from attention_predictor.offload.hf.fused.fusible import Fusible, is_plain
from attention_predictor.offload.hf.fused.mlp import FusibleMlp
from attention_predictor.offload.hf.fused.norm import FusibleNorm
from attention_predictor.offload.hf.fused.rotary import FusibleRotary

KINDS: tuple[type[Fusible], ...] = (FusibleNorm, FusibleMlp, FusibleRotary)


class FusedModules:
    """Within ``with``, each fusible module runs as one kernel, which saves launches in captured steps.

    Each module object gets a ``forward`` that overrides its class's, removed at the end. A module is skipped if it
    already has its own forward, has hooks, or has changed since it was found.

    Args:
        decoder: The language model, on a GPU that has the kernels. Its modules are compared with the kernels here
            (``fusible.py``), which takes some ten milliseconds.
    """

    @torch.no_grad()
    def __init__(self, decoder: nn.Module) -> None:
        seen: dict[Any, Any] = {}
        plain = [module for module in decoder.modules() if is_plain(module)]
        tried = (kind.find(module, seen) for kind in KINDS for module in plain)
        self.found = [one for one in tried if one is not None]
        self._changed: list[nn.Module] = []

    def __str__(self) -> str:
        counts = Counter(one.what for one in self.found)
        parts = [f"{count} {what if count > 1 else what[:-1]}" for what, count in counts.items()]
        return ", ".join(parts) or "nothing: no norm, gated MLP or rotary embedding has a form that a kernel has"

    def __enter__(self) -> None:
        try:
            for one in self.found:
                if one.is_as_found():
                    forward = one.forward()
                    self._changed.append(one.module)
                    vars(one.module)["forward"] = forward
        except BaseException:
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._changed:
            vars(self._changed.pop()).pop("forward", None)
