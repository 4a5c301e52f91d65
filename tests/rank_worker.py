"""One rank of a model divided by tensor parallelism: ``python rank_worker.py TOPIC FOLDER``, once for each rank.

Each topic is a function that gets the folder and this rank's number; its result is written to ``FOLDER/TOPIC-RANK.pt``.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from attention_predictor import OffloadConfig, attach
from attention_predictor.errors import AttachError, AttentionPredictorError, HostMemoryError
from attention_predictor.loading import load_model, tensor_parallel_options
from attention_predictor.offload.ranks import Ranks

SETTINGS: dict[str, Any] = {"sink": 16, "recent": 16, "slab_blocks": 4}
NEW = 12
CASES: dict[str, dict[str, Any]] = {
    "whole context": {"budget": 4096},
    "predictor": {"budget": 96},
    "by head, given": {"budget": 96, "budget_allocation": [[48, 144], [128, 64]]},
    "cake": {"budget": 96, "policy": "cake"},
    "cake by head": {"budget": 96, "policy": "cake", "budget_allocation": "cake-heads"},
    "qsim by head": {"budget": 96, "budget_allocation": "qsim-heads"},
    "tappa": {"budget": 96, "policy": "tappa"},
    "snapkv": {"budget": 96, "policy": "snapkv"},
    "quest": {"budget": 96, "policy": "quest"},
    "streaming": {"budget": 96, "policy": "streaming"},
    "full": {"budget": 96, "policy": "full"},
    "uncaptured": {"budget": 96, "prefetch": "graph"},  # on a CPU
}


def prompt() -> torch.Tensor:
    return torch.randint(1, 96, (1, 260), generator=torch.Generator().manual_seed(3))


def generate(model: PreTrainedModel, settings: dict[str, Any], new: int = NEW) -> dict[str, Any]:
    """Tokens, budgets and bytes of this process."""
    with attach(model, OffloadConfig(**SETTINGS | settings)) as engine:
        greedy = engine.generate(prompt(), max_new_tokens=new)
        stats = engine.stats
        found = {
            "tokens": greedy.tolist(),
            "budgets": dict(stats.layer_budgets),
            "host": sum(stats.host_bytes.values()),
        }
        return found | {"fallbacks": dict(stats.fallbacks), "needs": engine.runtime.room.bytes_for(1, 1000)}


def tokens(folder: Path, rank: int) -> dict[str, Any]:
    """Every case on every model; sampling with a seed and, from different states, without."""
    found: dict[str, Any] = {}
    for family in ("llama", "qwen3"):
        model = load_model(str(folder / family), "cpu", "float32", ranks=2)
        found[family] = {name: generate(model, settings) for name, settings in CASES.items()}
        sampling = {"max_new_tokens": NEW, "temperature": 1.0}
        with attach(model, OffloadConfig(budget=96, **SETTINGS)) as engine:
            torch.manual_seed(100 + rank)
            found[family]["seeded"] = engine.generate(prompt(), seed=5, **sampling).tolist()
            found[family]["unseeded"] = engine.generate(prompt(), **sampling).tolist()
            torch.manual_seed(200 + rank)
            found[family]["by transformers"] = model.generate(prompt(), max_new_tokens=NEW, do_sample=True).tolist()
    return found


def decisions(folder: Path, rank: int) -> dict[str, str]:
    """What one rank refuses, or can't do, holds for both: each message, by rank."""
    found: dict[str, str] = {}

    def refused(name: str, run: Any) -> None:
        try:
            run()
        except AttentionPredictorError as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"

    model = load_model(str(folder / "llama"), "cpu", "float32", ranks=2)
    wrong = "nowhere" if rank == 1 else "default"
    refused("a predictor on one rank", lambda: attach(model, OffloadConfig(predictor=wrong)))
    refused("compile", lambda: attach(model, OffloadConfig(compile=True)))
    refused(
        "heads given", lambda: attach(model, OffloadConfig(budget=96, budget_allocation=[[96] * 4] * 2, **SETTINGS))
    )
    limit = 1 if rank == 1 else None  # of bytes
    with attach(model, OffloadConfig(host_memory=limit, budget=96, **SETTINGS)) as engine:
        refused("host memory", lambda: engine.generate(prompt(), max_new_tokens=2))
        refused("host memory of a forward", lambda: _forward(model))
    with attach(model, OffloadConfig(budget=96, **SETTINGS)) as engine:
        found["after"] = str(engine.generate(prompt(), max_new_tokens=2).shape)
    odd = AutoModelForCausalLM.from_pretrained(folder / "odd", dtype=torch.float32, **tensor_parallel_options(2))
    refused("heads", lambda: attach(odd))
    found["left as it was"] = str(odd.config._attn_implementation)
    return found


def capture(folder: Path, rank: int) -> dict[str, Any]:
    """Steps on emulated kernels; then one rank that lacks its kernels makes both use the thread."""
    import pytest
    from emulated import emulate_steps

    from attention_predictor.offload.hf import graph

    model, settings = load_model(str(folder / "llama"), "cpu", "float32", ranks=2), {"budget": 96, "prefetch": "graph"}
    by_head = settings | {"budget_allocation": CASES["by head, given"]["budget_allocation"]}
    with pytest.MonkeyPatch.context() as patch:
        emulate_steps(patch)
        found = {"captured": generate(model, settings), "by head": generate(model, by_head)}
        own = graph.why_not_captured
        patch.setattr(graph, "why_not_captured", lambda *given: "no kernels" if rank == 1 else own(*given))
        exchanged = exchanges(patch)
        found |= {"not captured": generate(model, settings), "exchanges": len(exchanged)}
        exchanged.clear()
        generate(model, settings, new=NEW + 8)
        return found | {"exchanges of more steps": len(exchanged)}


def on_gpus(folder: Path, rank: int) -> dict[str, Any]:
    """Captured steps with NCCL in them; then with a capture that fails on the second rank."""
    import pytest

    from attention_predictor.offload.hf.graph import CacheGraph, CaptureError

    model, found = load_model(str(folder / "llama"), "cuda", "float32", ranks=2), {}
    for name in ("whole context", "predictor", "by head, given", "quest"):
        with attach(model, OffloadConfig(**SETTINGS | CASES[name])) as engine:
            tokens = engine.generate(prompt(), max_new_tokens=4 * NEW).tolist()
            found[name] = tokens, engine.stats.captured_steps, dict(engine.stats.fallbacks)

    def fail(*_: object) -> None:
        raise CaptureError("this rank reads a value")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(CacheGraph, "_record", fail)
        with attach(model, OffloadConfig(budget=96, **SETTINGS)) as engine:
            tokens = engine.generate(prompt(), max_new_tokens=4 * NEW).tolist()
            found["failed"] = tokens, engine.stats.captured_steps, dict(engine.stats.fallbacks)
    return found


def exchanges(patch: Any) -> list[Any]:
    """What ranks send one another from now on, where the host decides."""
    sent: list[Any] = []
    gather = Ranks.gather
    patch.setattr(Ranks, "gather", lambda self, value: sent.append(value) or gather(self, value))
    return sent


def capture_fails(folder: Path, rank: int) -> dict[str, Any]:
    """The second rank's capture fails, or its reservation of memory: both ranks use the thread, or refuse."""
    import pytest
    from emulated import emulate_steps

    from attention_predictor.offload.hf.graph import CacheGraph, CaptureError

    model, settings = load_model(str(folder / "llama"), "cpu", "float32", ranks=2), {"budget": 96, "prefetch": "graph"}

    def record(self: CacheGraph, cache: object) -> tuple[object, object]:
        if rank == 1:
            raise CaptureError("this rank reads a value")
        return object(), model_output

    with pytest.MonkeyPatch.context() as patch:
        emulate_steps(patch)
        emulated, model_output = CacheGraph.run, model(prompt())

        def run(self: CacheGraph, cache: Any, kwargs: dict[str, Any]) -> object:
            if self.entered and not self.eager_steps_left:
                self._capture(cache)  # which a CPU does not come to by itself
            return emulated(self, cache, kwargs)

        patch.setattr(CacheGraph, "run", run)
        patch.setattr(CacheGraph, "_record", record)
        found = {"failed": generate(model, settings)}
    with pytest.MonkeyPatch.context() as patch:
        emulate_steps(patch)
        if rank == 1:
            patch.setattr(CacheGraph, "_enter", _no_memory)
        try:
            generate(model, settings)
        except AttentionPredictorError as error:
            found["refused"] = f"{type(error).__name__}: {error}"
    return found


def dies(folder: Path, rank: int) -> None:
    """The second rank raises in the midst of a forward."""
    model = load_model(str(folder / "llama"), "cpu", "float32", ranks=2)
    with attach(model, OffloadConfig(budget=96, **SETTINGS)) as engine:
        if rank == 1:
            model.model.layers[1].register_forward_pre_hook(_fail)
        engine.generate(prompt(), max_new_tokens=4)


def out_of_memory(folder: Path, rank: int) -> None:
    """``attnpred generate``, whose second rank runs out of memory in the midst of a forward."""
    _generate_with(folder, _no_gpu_memory if rank == 1 else None)


def waits(folder: Path, rank: int) -> None:
    """``attnpred generate``, which stays in a forward; a file says that it has come there."""

    def wait(*_: object) -> None:
        (folder / f"waits-{rank}").touch()
        time.sleep(60)

    _generate_with(folder, wait)


def _generate_with(folder: Path, hook: Any) -> None:
    from attention_predictor import generate as command
    from attention_predictor.cli import main as attnpred

    def load(*given: Any) -> PreTrainedModel:
        model = load_model(*given)
        if hook is not None:
            model.model.layers[1].register_forward_pre_hook(hook)
        return model

    command.load_model = load
    sys.exit(attnpred(["generate", "--model", str(folder / "text"), "--device", "cpu", "--prompt", "one two three"]))


@torch.no_grad()
def _forward(model: PreTrainedModel) -> None:
    model(prompt())


def _fail(*_: object) -> None:
    raise AttachError("this rank has failed")


def _no_gpu_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _no_memory(*_: object) -> None:
    raise HostMemoryError("nothing is left")


def main() -> None:
    warnings.filterwarnings("ignore")
    topic, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.save(globals()[topic](folder, rank), folder / f"{topic}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
