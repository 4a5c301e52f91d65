"""``attnpred train``: fit a predictor to recorded histories."""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from attention_predictor.commands.train import add_arguments as add_arguments
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.predictor.model import AttentionPredictor, architecture
from attention_predictor.progress import Progress
from attention_predictor.train.mixture import Mixture, Place, averaged, left_out
from attention_predictor.train.objective import document_loss
from attention_predictor.train.options import TrainOptions
from attention_predictor.train.report import CARD_FILE, CURVES_FILE, card, draw_curves, summary
from attention_predictor.train.shards import Recording
from attention_predictor.train.state import forget_state, read_finished, read_state, restore, write_state
from attention_predictor.train.tracking import check_tracker, start_tracker
from attention_predictor.train.validate import Metrics, mean_ahead, validate, why_not_judged
from attention_predictor.writing import locked, write_atomically

logger = logging.getLogger(__name__)

DOCUMENTS = 4  # documents per step, from which its records are drawn
CACHE_SHARE = 0.25  # share of the memory free at the start that caches recordings, over all processes
RULES = ("last", "ema", "mean")  # evaluated alongside the trained predictor


def fit(
    data: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    options: TrainOptions | None = None,
    *,
    device: str = "auto",
    tracker: str = "none",
    resume: bool = False,
    progress: bool = False,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Train on the recording `data`, or on several, save the predictor to `out`, return its metrics.

    An interrupt ends training early and saves the best so far. A step learns from `batch` records of a few documents;
    states start as decoding does: from 64 rows, then row by row. What a step sees depends on seed, step and process
    alone, so that a continued run repeats nothing and leaves out nothing.
    Several recordings, say one a model, count equally in training and judging, however many documents they have.

    Args:
        device: "cpu", or "auto" for what `accelerate` finds: one GPU, several launched processes, else the CPU.
        tracker: "none", "tensorboard" or "wandb" (offline without a key).
        resume: Continue from the state that an unfinished run left in `out`; a finished predictor is kept.
        block_size: Required block size of the recording; `None` accepts any.

    Raises:
        ConfigError, DataError, CheckpointError: Bad input; raised before any training.
        WriteError: Writing failed, for example on a full disk; the last saved state is intact and can be resumed.
    """
    options = options if options is not None else TrainOptions()
    check_tracker(tracker)
    accelerator = start(device, options.precision, tracker, out)
    directories = [str(one) for one in ([data] if isinstance(data, str | PathLike) else data)]
    mixture, out = Mixture(directories, block_size=block_size), Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # fail now, not after the training
        raise ConfigError(f"out={str(out)!r} can't be made: {error.strerror or error}") from error
    with locked(out) if accelerator.is_main_process else nullcontext():
        return _fit(directories, mixture, out, options, accelerator, tracker, resume=resume, progress=progress)


def _fit(
    directories: list[str],
    mixture: Mixture,
    out: Path,
    options: TrainOptions,
    accelerator: Accelerator,
    tracker: str,
    *,
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    block_size = int(mixture.meta["block_size"])
    decisive = asdict(options) | {"recording": mixture.fingerprint}
    finished = read_finished(out, decisive, resume=resume, block_size=block_size)
    if finished is not None:
        logger.warning(f"{out}: a predictor trained with these options is here already: it is kept")
        return finished if accelerator.is_main_process else {}
    training, held_out = mixture.split(options.val_fraction, options.seed)
    meta, cache = mixture.meta, Cache(mixture, accelerator.num_processes)
    noted = set[str]()

    def judged(predictor: AttentionPredictor) -> Metrics:
        found = []
        for dataset, documents in zip(mixture.recordings, held_out, strict=True):
            found.append(validate(predictor, map(cache.load, documents), meta, accelerator.device, options.horizon))
            if not found[-1]["relative_recovery_ahead"]:
                raise DataError(f"{dataset.directory}: {why_not_judged(map(cache.load, documents), meta)}")
        for number, budget in left_out(found):
            line = f"{directories[number]}: no held-out document is long enough to judge a budget of {budget} tokens"
            if line not in noted:
                noted.add(line)
                logger.warning(f"{line}: means leave that budget out")
        return averaged(found)

    settings = decisive | {
        "documents": sum(map(len, training)),
        "processes": accelerator.num_processes,
    }
    state = read_state(out, settings, resume=resume)

    predictor = initial(options, accelerator.device, block_size)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=options.lr, weight_decay=1e-4)
    run: dict[str, Any] = {"step": 0, "best": copied(predictor), "best_mean": -1.0, "validation": {}, "curve": []}
    if state is not None:
        restore(out, state, predictor, optimizer)
        run = {name: state[name] for name in run}
    quiet = not (progress and accelerator.is_main_process)
    # Find damaged shards now, not hours into the run. Held-out documents come last: they are used next.
    places = [place for documents in [*training, *held_out] for place in documents]
    with Progress("reading", len(places), "documents", ends=False, quiet=quiet) as reading:
        for place in places:
            cache.load(place)
            reading.update()
    if state is None and accelerator.is_main_process:
        run["validation"] = {name: judged(architecture(name)(block_size=block_size)) for name in RULES}
    start_tracker(accelerator, tracker, str(out), settings)

    def save_state() -> None:
        state = run | {"predictor": copied(predictor), "optimizer": optimizer.state_dict()}
        write_state(out, state | {"options": settings})

    accelerator.wait_for_everyone()  # all have looked for a state
    if state is None and accelerator.is_main_process:
        save_state()  # so that a run which ends before its first validation can be continued
    interrupted, losses = False, list[float]()
    done = run["step"]
    bar = Progress(f"train {options.arch}", options.steps, "steps", done=done, quiet=quiet)
    try:
        for step in range(done + 1, options.steps + 1):
            rng = random.Random(f"{options.seed}/{step}/{accelerator.process_index}")
            losses.append(train_step(predictor, optimizer, accelerator, options, cache, training, meta, rng, step))
            done = step
            if step % options.log_every == 0 or step == options.steps:
                if accelerator.is_main_process:
                    now = judged(predictor)
                    keep(run, options.arch, predictor, now, step, sum(losses) / len(losses))
                    save_state()
                    against = {name: f"{mean_ahead(run['validation'][name]):.4f}" for name in RULES}
                    bar.show(loss=f"{losses[-1]:.3f}", recovery=f"{mean_ahead(now):.4f}", **against)
                    accelerator.log(flat(now) | {"loss": sum(losses) / len(losses)}, step=step)
                losses = []
                accelerator.wait_for_everyone()
            bar.update()
        bar.close()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close(finished=False)  # if not closed yet
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}
    if options.arch not in run["validation"]:  # interrupted before the first validation
        keep(run, options.arch, predictor, judged(predictor), done, sum(losses) / max(len(losses), 1))
    predictor.load_state_dict(run["best"])
    metrics = {"validation": run["validation"], "steps": done, "interrupted": interrupted}
    predictor.training_facts = {
        "recorded_from": meta["model"],
        "rows": meta["rows"],
        "documents": sum(map(len, training)),
        "held_out_documents": sum(map(len, held_out)),
        "options": asdict(options),
        "recording": mixture.fingerprint,
        "metrics": metrics,
    }
    predictor.save(out)
    rules = {name: mean_ahead(run["validation"][name]) for name in RULES}
    draw_curves(out / CURVES_FILE, run["curve"], rules, options.arch)
    write_atomically(out / CARD_FILE, card(predictor.training_facts, options, directories, str(out)))
    if not interrupted:
        forget_state(out)
    return metrics


def start(device: str, precision: str, tracker: str, out: str | PathLike[str]) -> Accelerator:
    """The device or devices to train on; ConfigError if not available."""
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={device!r} can't be used; choose auto (what accelerate finds) or cpu")
    # Else a second run in this process would keep the first one's precision.
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(out),
    )


def initial(options: TrainOptions, device: torch.device, block_size: int) -> AttentionPredictor:
    """The predictor that training starts from, the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        if options.init is None:
            return architecture(options.arch)(block_size=block_size).to(device)
        return architecture(options.arch).from_pretrained(options.init, device, block_size=block_size).train()


def schedule(step: int, steps: int) -> float:
    """The learning rate at a step (from 1 on) as a share of the largest: a short warm-up, then a cosine."""
    return min(step / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))


def train_step(
    predictor: AttentionPredictor,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    options: TrainOptions,
    cache: Cache,
    training: list[list[Place]],
    meta: dict[str, Any],
    rng: random.Random,
    step: int,
) -> float:
    """One step of the optimiser; the loss, averaged over processes.

    `training` holds the documents of each recording; recordings take turns.
    """
    for group in optimizer.param_groups:
        group["lr"] = options.lr * schedule(step, options.steps)
    optimizer.zero_grad(set_to_none=True)
    batch = max(1, options.batch // accelerator.num_processes)
    count = min(DOCUMENTS, batch)
    turns = range(step * count, (step + 1) * count)
    chosen = [cache.load(rng.choice(training[turn % len(training)])) for turn in turns]
    total = 0.0

    def network(state_XSNC: Tensor) -> Tensor:
        with accelerator.autocast():
            return predictor(state_XSNC).float()

    for recording in chosen:
        records = max(1, batch // len(chosen))
        part = document_loss(
            predictor, network, recording, records, meta, options.loss, options.horizon, rng, accelerator.device
        )
        if part is not None:
            (part / len(chosen)).backward()
            total += part.item() / len(chosen)
    # A few thousand numbers: one reduction for all. No DDP wrapper, since methods other than `forward` are
    # differentiated too.
    gradients = torch.cat([_gradient(parameter).flatten() for parameter in predictor.parameters()])
    gradients = accelerator.reduce(torch.cat([gradients, gradients.new_tensor([total])]), "mean")
    total = float(gradients[-1])
    if not math.isfinite(total):
        raise ConfigError(f"training diverged at step {step}: lr={options.lr} is too large")
    sizes = [parameter.numel() for parameter in predictor.parameters()]
    for parameter, gradient in zip(predictor.parameters(), gradients[:-1].split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
    optimizer.step()
    return total


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def keep(run: dict[str, Any], arch: str, predictor: AttentionPredictor, now: Metrics, step: int, loss: float) -> None:
    """Record a validation, and save the weights if they are the best so far."""
    recovered = mean_ahead(now)
    run["step"] = step
    run["curve"].append({"step": step, "loss": loss, "recovered": recovered})
    if recovered > run["best_mean"]:
        run["best"], run["best_mean"], run["validation"][arch] = copied(predictor), recovered, now


def flat(metrics: Metrics) -> dict[str, float]:
    return {f"{metric}/{budget}": value for metric, values in metrics.items() for budget, value in values.items()}


class Cache:
    """Cache of loaded recordings; the oldest are dropped when memory is short."""

    def __init__(self, mixture: Mixture, processes: int) -> None:
        self.mixture, self.held = mixture, dict[Place, Recording]()
        self.limit = int(CACHE_SHARE * psutil.virtual_memory().available) // processes

    def load(self, place: Place) -> Recording:
        if place not in self.held:
            self.held[place] = self.mixture.load(place)
            while len(self.held) > 1 and sum(r.nbytes for r in self.held.values()) > self.limit:
                self.held.pop(next(iter(self.held)))
        return self.held[place]


def copied(predictor: AttentionPredictor) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in predictor.state_dict().items()}


def main(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit code: 130 if interrupted (the best weights so far are saved)."""
    options = TrainOptions.of(args)
    metrics = fit(
        args.data,
        args.out,
        options,
        device=args.device,
        tracker=args.tracker,
        resume=args.resume,
        progress=True,
    )
    if not metrics:  # not the process that reports
        return 0
    if args.json:
        print(json.dumps({"out": str(args.out), **metrics}))
    else:
        print(summary(metrics, options, str(args.out)))
    return 130 if metrics["interrupted"] else 0
