"""Train a predictor on recorded histories (attnpred record makes them).

Examples:
  attnpred train --data recordings/ --out my-predictor/
  attnpred train --data recordings/ --out published/ --arch paper --loss mse --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import random
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attention_predictor.predictor.errors import ConfigError, DataError
from attention_predictor.predictor.model import AttentionPredictor, architecture
from attention_predictor.train.dataset import HistoryDataset
from attention_predictor.train.objective import LOSSES, TARGETS, document_loss
from attention_predictor.train.shards import Recording
from attention_predictor.train.validate import recovery

DOCUMENTS = 4  # documents that one step's records come from
CACHE_BYTES = 4 << 30  # recordings kept in memory
RULES = ("last", "ema", "mean")  # judged beside the trained predictor


def fit(
    data: str | PathLike[str],
    out: str | PathLike[str],
    *,
    arch: str = "time-filters",
    init: str | None = None,
    loss: str = "ce",
    horizon: int = 24,
    steps: int = 1000,
    batch: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    val_fraction: float = 0.1,
    block_size: int = 16,
    log_every: int = 100,
    progress: bool = False,
) -> dict[str, Any]:
    """Train on the recording `data`, save the predictor to `out`, return its metrics.

    Every `log_every` of the `steps` the recovery on held-out documents is measured, and the best predictor
    by it is the one saved; an interrupt ends training early and saves the best so far. A step learns from
    `batch` records of a few documents; states start as decoding does: from 64 rows, then row by row.
    """
    device = check_options(
        arch=arch,
        loss=loss,
        horizon=horizon,
        steps=steps,
        batch=batch,
        lr=lr,
        device=device,
        val_fraction=val_fraction,
        every=log_every,
    )
    dataset = HistoryDataset(data, block_size=block_size)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:  # better now than after the training
        raise ConfigError(f"out={str(out)!r} can't be made: {error.strerror or error}") from error
    training, held_out = split_documents(dataset, val_fraction, seed)
    meta, cache = dataset.meta, Cache(dataset)
    validation = [cache.load(document) for document in held_out]
    found = {name: recovery(architecture(name)(), validation, meta, device) for name in RULES}
    if not found["last"]:
        raise DataError(f"{dataset.directory}: held-out documents are too short to judge a predictor by recovery")

    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if init is None:
            predictor = architecture(arch)(block_size=block_size).to(device)
        else:
            predictor = architecture(arch).from_pretrained(init, device, block_size=block_size).train()
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=1e-4)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / steps)))
    )
    best, best_mean, done, interrupted = copied(predictor), -1.0, 0, False
    bar = tqdm(range(1, steps + 1), desc=f"train {arch}", disable=not progress)
    try:
        for step in bar:
            optimizer.zero_grad(set_to_none=True)
            chosen = [cache.load(rng.choice(training)) for _ in range(min(DOCUMENTS, batch))]
            total = 0.0
            for recording in chosen:
                records = max(1, batch // len(chosen))
                part = document_loss(predictor, recording, records, meta, loss, horizon, rng, device)
                if part is not None:
                    (part / len(chosen)).backward()
                    total += part.item() / len(chosen)
            if not math.isfinite(total):
                raise ConfigError(f"training diverged at step {step}: lr={lr} is too large")
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done = step
            if step % log_every == 0 or step == steps:
                now = recovery(predictor, validation, meta, device)
                if mean(now) > best_mean:
                    best, best_mean, found[arch] = copied(predictor), mean(now), now
                against = {name: f"{mean(found[name]):.4f}" for name in RULES}
                bar.set_postfix(loss=f"{total:.3f}", recovery=f"{mean(now):.4f}", **against)
    except KeyboardInterrupt:
        interrupted = True
    if arch not in found:  # interrupted before the first validation
        best, found[arch] = copied(predictor), recovery(predictor, validation, meta, device)
    predictor.load_state_dict(best)
    metrics = {"recovery": found, "steps": done, "interrupted": interrupted}
    predictor.training_facts = {
        "recorded_from": meta["model"],
        "documents": len(training),
        "held_out_documents": len(held_out),
        "options": {
            "init": init,
            "loss": loss,
            "horizon": horizon,
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "seed": seed,
        },
        "metrics": metrics,
    }
    predictor.save(out)
    return metrics


def check_options(
    *,
    arch: str,
    loss: str,
    horizon: int,
    steps: int,
    batch: int,
    lr: float,
    device: torch.device | str,
    val_fraction: float,
    every: int,
) -> torch.device:
    """The device to train on; ConfigError naming the first option that has a value which is not allowed."""
    if arch not in TARGETS:
        raise ConfigError(f"arch={arch!r} can't be trained; choose from {', '.join(sorted(TARGETS))}")
    if loss not in LOSSES:
        raise ConfigError(f"loss={loss!r} is not a loss; choose from {', '.join(LOSSES)}")
    for name, value in (("horizon", horizon), ("steps", steps), ("batch", batch), ("log_every", every)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    for name, number, top in (("lr", lr, 1.0), ("val_fraction", val_fraction, 0.9)):
        if not 0 < number <= top:
            raise ConfigError(f"{name}={number} must be above 0 and at most {top}")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={str(device)!r} can't be used: {str(error).splitlines()[0]}") from error


class Cache:
    """Recordings loaded once while they fit in memory; the oldest go first."""

    def __init__(self, dataset: HistoryDataset) -> None:
        self.dataset, self.held = dataset, dict[str, Recording]()

    def load(self, document: str) -> Recording:
        if document not in self.held:
            self.held[document] = self.dataset.load(document)
            while len(self.held) > 1 and sum(r.nbytes for r in self.held.values()) > CACHE_BYTES:
                self.held.pop(next(iter(self.held)))
        return self.held[document]


def split_documents(dataset: HistoryDataset, val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents to train on and to judge by: as recorded where splits were given, else at random."""
    held_out = [document for document in dataset.documents if dataset.split(document) == "validation"]
    if not held_out:
        documents = sorted(dataset.documents)
        random.Random(seed).shuffle(documents)
        held_out = documents[: max(1, round(val_fraction * len(documents)))]
    training = [document for document in dataset.documents if document not in set(held_out)]
    if not training:
        raise DataError(f"{dataset.directory}: no document is left to train on; record at least 2")
    return training, held_out


def mean(by_budget: dict[str, float]) -> float:
    return sum(by_budget.values()) / len(by_budget)


def copied(predictor: AttentionPredictor) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in predictor.state_dict().items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attnpred train`."""
    parser.add_argument("--data", required=True, metavar="DIR", help="directory that 'attnpred record' wrote")
    parser.add_argument("--out", required=True, metavar="CKPT", help="directory to save the predictor to")
    parser.add_argument(
        "--arch", default="time-filters", choices=sorted(TARGETS), help="architecture (default: %(default)s)"
    )
    parser.add_argument("--init", metavar="CKPT", help="start from this predictor, of the same architecture")
    parser.add_argument(
        "--loss", default="ce", choices=LOSSES, help="cross-entropy or squared error (default: %(default)s)"
    )
    parser.add_argument(
        "--horizon", type=int, default=24, help="next steps whose largest mass is the target (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="records (layer, KV head) a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Run `attnpred train`: metrics as JSON on stdout; 130 when interrupted (the best so far is saved)."""
    names = ("arch", "init", "loss", "horizon", "steps", "batch", "lr", "device", "seed")
    metrics = fit(args.data, args.out, progress=True, **{name: getattr(args, name) for name in names})
    print(json.dumps({"out": str(args.out), **metrics}))
    return 130 if metrics["interrupted"] else 0
