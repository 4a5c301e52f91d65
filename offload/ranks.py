"""Ranks: the processes among which a model is divided by tensor parallelism, and what they do together.

transformers divides a model (``DistributedConfig(tp_size=…)``, ``tp_plan="auto"``): each rank has some heads of every
layer. Selection is by KV head, so steps need no traffic beyond the model's own. What must be the same on all ranks is
agreed upon here: budgets from statistics over heads, random seeds, refusals and fallbacks. A rank that went another way
would leave the others waiting in their next collective operation for ever.

All ranks must come to each of these calls, in the same order. A single process pays nothing for them. What the host
decides is exchanged between CPUs (gloo): through NCCL it would wait for the GPU.

Suffixes: B sequences, G KV heads of this rank, F statistics.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention_predictor.errors import AttachError, AttentionPredictorError, one_line

Budget = TypeVar("Budget")
TENSOR_PARALLEL = "tp"  # the dimension's name in transformers' device meshes


class Ranks:
    """This process among those that have a part of the model.

    Attributes:
        count, rank: How many there are, and this one's number from 0 on.
        parts: Into how many shares the KV heads are split. ``count``: each rank has its own heads. 1: each rank has all
            of them, as in models whose plan gathers queries, keys and values.
        on_host: How many of them share this machine's memory.
    """

    def __init__(self, group: Any = None) -> None:
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.parts = 1
        self.on_host = min(self.count, int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))
        self._group, self._host_group = group, None if group is None else _between_hosts(group)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """The ranks among which this model is divided; one for a model that is whole.

        Raises:
            AttachError: The model is divided in another way than by tensor parallelism.
        """
        mesh = _mesh_of(model)
        if mesh is None:
            return cls()
        names = mesh.mesh_dim_names or (TENSOR_PARALLEL,) * (mesh.ndim == 1)
        sizes = dict(zip(names, mesh.shape, strict=False))
        other = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name != TENSOR_PARALLEL]
        if other or (mesh.ndim > 1 and TENSOR_PARALLEL not in sizes):
            found = ", ".join(other) or f"a device mesh of shape {tuple(mesh.shape)}"
            raise AttachError(
                f"{type(model).__name__} is divided by {found}: of several processes, tensor parallelism alone is "
                "supported (tp_size)"
            )
        if mesh.size() == 1:
            return cls()
        return cls(mesh.get_group() if mesh.ndim == 1 else mesh.get_group(TENSOR_PARALLEL))

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, by rank. Values are sent between processes: plain ones of any type."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._host_group)
        return found

    def first(self, value: Any) -> Any:
        """The value of the lowest rank that gives one; ``None`` if no rank does."""
        return next((one for one in self.gather(value) if one is not None), None)

    def same_seed(self, seed: int | None) -> int | None:
        """The first rank's seed; where it has none, one that is drawn from its global state. Alone: ``seed``."""
        if self.count == 1:
            return seed
        return int(self.gather(int(torch.randint(2**62, ())) if seed is None else seed)[0])

    def share_random_state(self, device: torch.device) -> None:
        """Give this rank the first one's state of a device's global random numbers.

        Ranks that sample from the same logits then draw the same tokens. Without it they would not: loading a part of
        a model draws as many numbers as that part has.
        """
        if self.count == 1:
            return
        own = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
        first = self.gather(own)[0]
        if torch.equal(first, own):
            return
        if device.type == "cpu":
            torch.set_rng_state(first)
        else:
            torch.cuda.set_rng_state(first, device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done within it fails on all ranks if it fails on any, with the reason of the first.

        Within it ranks must not wait for each other after something that may fail on one rank alone.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
        if self.count == 1:
            return
        reasons = self.gather(None if failure is None else _portable(failure))
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason is not None:
                kind, message = reason
                raise kind(f"rank {rank}: {message}")

    def gather_heads(self, parts_BGF: Sequence[Tensor]) -> list[Tensor]:
        """Statistics by KV head, ``[B, G, F]`` for each layer, of the KV heads of all ranks in the model's order."""
        if self.parts == 1:
            return list(parts_BGF)
        sizes = [part.shape[1] for part in parts_BGF]
        own = torch.cat(list(parts_BGF), 1).contiguous()
        found = [own.new_empty(own.shape) for _ in range(self.count)]
        dist.all_gather(found, own, group=self._group)
        return [torch.cat(layer, 1) for layer in zip(*(one.split(sizes, 1) for one in found), strict=True)]

    def own_heads(self, budgets: Sequence[Budget]) -> tuple[Budget, ...]:
        """Of the budgets of all KV heads of a layer, those of this rank's heads."""
        own = len(budgets) // self.parts
        first = own * (self.rank if self.parts > 1 else 0)
        return tuple(budgets[first : first + own])

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self  # a copied cache belongs to the same processes


@functools.cache
def _between_hosts(group: Any) -> Any:
    """The group itself if it can send between CPUs, else one of the same ranks that can. All of them have to call it.

    Kept: each attach would make another one.
    """
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _mesh_of(model: nn.Module) -> Any:
    """The device mesh over which a model's weights lie, ``None`` without one."""
    # Read from distributed tensors by their attribute: importing their type takes a while. Versions of transformers
    # that keep plain tensors set the model's.
    weights = (getattr(weight, "device_mesh", None) for weight in model.parameters())
    found = next((mesh for mesh in weights if mesh is not None), None)
    if found is not None and getattr(model, "_device_mesh", None) is None:
        return found
    return getattr(model, "_device_mesh", None)  # of all dimensions; that of a weight is a slice


def _portable(error: Exception) -> tuple[type[Exception], str]:
    """An error's type and message for other processes; a type that is made of a message alone."""
    if not isinstance(error, AttentionPredictorError):
        return AttachError, f"{type(error).__name__}: {one_line(error)}"
    return next(kind for kind in type(error).__mro__ if "__init__" not in vars(kind)), str(error)
