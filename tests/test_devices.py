"""A model on several devices: where its layers compute, a stage for each device, the stock model's tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.errors import AttachError, ConfigError
from attention_predictor.loading import load_model, read_device_map
from attention_predictor.offload.blocks.prefetch import ThreadPrefetcher
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.placement import Placement, input_device
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.stats import DeviceCounts

accelerate = pytest.importorskip("accelerate")

SMALL: dict[str, Any] = {"budget": 96, "sink": 16, "recent": 16, "slab_blocks": 4}
CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
NEW = 12
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_tiny_model("llama", num_hidden_layers=4).save_pretrained(path)
    return path


def spread(first: int | str, second: int | str) -> dict[str, int | str]:
    """A device map: embeddings and half the layers on one device, the rest on another."""
    parts = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    return parts | {f"model.layers.{number}": first if number < 2 else second for number in range(4)}


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def hook(module: torch.nn.Module, device: torch.device, offload: bool = False) -> None:
    """accelerate's hook, without what it does: so that no such device is needed."""
    module._hf_hook = accelerate.hooks.AlignDevicesHook(device, offload=offload)


class TestPlacement:
    def of(self, model: PreTrainedModel) -> Placement:
        return Placement.of(model, model.model, [0, 1])

    def test_on_one_device(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        assert self.of(tiny_model()) == Placement({0: CPU, 1: CPU}, (CPU,), brought=False)
        assert self.of(tiny_model()).why_not_captured is None

    def test_on_two_devices_and_brought_to_one(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = tiny_model()
        hook(model, FIRST)
        hook(model.model.layers[1], SECOND)
        placement = self.of(model)
        assert placement == Placement({0: FIRST, 1: SECOND}, (FIRST, SECOND), brought=False)
        assert placement.why_not_captured == "the model computes on several devices (cuda:0, cuda:1)"
        model.model.layers[1].to("meta")  # kept elsewhere: each of its modules is brought to where the layer computes
        hook(model.model.layers[1], FIRST, offload=True)
        placement = self.of(model)
        assert placement == Placement({0: FIRST, 1: FIRST}, (FIRST,), brought=True)
        assert "bring" in str(placement.why_not_captured)

    def test_the_first_device_takes_the_inputs(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = accelerate.cpu_offload(tiny_model(), execution_device=CPU)
        assert model.device.type == "meta"
        assert input_device(model) == CPU

    def test_devices_by_number_or_without_one(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = tiny_model()
        hook(model.model.layers[0], torch.device("cpu:0"))
        model.model.layers[1]._hf_hook = accelerate.hooks.SequentialHook(
            accelerate.hooks.ModelHook(), accelerate.hooks.AlignDevicesHook(1)
        )
        assert self.of(model).layers == {0: CPU, 1: SECOND}

    def test_what_is_refused(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = tiny_model()
        model.lm_head.to("meta")
        with pytest.raises(AttachError, match="weights on no device"):
            attach(model)
        model = tiny_model()
        hook(model.model.layers[1], SECOND)
        with pytest.raises(ConfigError, match="compile=True: LlamaForCausalLM has no captured steps, since the model"):
            attach(model, OffloadConfig(compile=True))
        model.config.num_kv_shared_layers = 1
        with pytest.raises(AttachError, match=r"shares keys among layers, which are on several devices \(cpu, cuda:1"):
            attach(model)


@pytest.fixture(params=["disk", "cpu_offload", "cpu_offload_with_hook"])
def hooked(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> PreTrainedModel:
    """Models whose weights hooks bring, on the CPU alone."""
    if request.param == "disk":
        return loaded(folder, device_map=spread("cpu", "disk"), offload_folder=tmp_path)
    if request.param == "cpu_offload":
        return accelerate.cpu_offload(loaded(folder), execution_device=CPU)
    return accelerate.cpu_offload_with_hook(loaded(folder), execution_device="cpu")[0]


@pytest.mark.parametrize("policy", ["predictor", "quest", "cake"])
def test_weights_that_hooks_bring(hooked: PreTrainedModel, folder: Path, ids: Callable[..., Any], policy: str) -> None:
    given = {"max_new_tokens": NEW, "do_sample": False}
    stock, plain = loaded(folder).generate(ids(150), **given), loaded(folder)
    settings = SMALL | {"policy": policy}
    with attach(plain, OffloadConfig(**settings)) as engine:
        sparse = engine.generate(ids(150), max_new_tokens=NEW)
    with attach(hooked, OffloadConfig(policy=policy, budget=4096)) as engine:
        assert torch.equal(hooked.generate(ids(150), **given), stock)
    with attach(hooked, OffloadConfig(**settings)) as engine:
        assert torch.equal(engine.generate(ids(150), max_new_tokens=NEW), sparse)
        assert engine.device == CPU
        assert engine.stats.prefetch == "thread: hooks bring the model's weights for each forward"
        assert not engine.stats.fallbacks  # there is no GPU that would have captured
    with attach(hooked, OffloadConfig(**settings, prefetch="graph")) as engine:
        [noted] = engine.stats.fallbacks
        assert (
            noted
            == "the prefetch thread in place of captured steps: " + "hooks bring the model's weights for each forward"
        )
    assert torch.equal(hooked.generate(ids(150), **given), stock)  # detached


def padded(prompt: Tensor) -> dict[str, Any]:
    """Arguments of ``generate`` for a prompt whose first sequence has padding on the left."""
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    return {"input_ids": prompt, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}


def test_layers_that_are_not_offloaded_and_padding(
    hooked: PreTrainedModel, folder: Path, ids: Callable[..., Any]
) -> None:
    given = padded(ids(150, 2))
    stock = loaded(folder).generate(**given)
    with attach(hooked, OffloadConfig(budget=4096, skip_layers=(0, 3))):
        assert torch.equal(hooked.generate(**given), stock)


def split_in_two(engine: Engine) -> None:
    """Give the upper layers a stage of their own, as if they were on another device."""
    stages = dict(engine.runtime.stage_of)
    first = stages[0]
    second = replace(first, prefetcher=ThreadPrefetcher(CPU), counts=DeviceCounts(CPU, len(stages)))
    engine.runtime.stage_of = {number: first if number < 2 else second for number in stages}


@pytest.mark.parametrize("settings", [{}, {"budget_allocation": "cake-heads"}, {"policy": "snapkv"}])
def test_each_stage_has_its_own_thread_and_counts(
    folder: Path, ids: Callable[..., Any], settings: dict[str, Any]
) -> None:
    model, found = loaded(folder), []
    for split in (False, True):
        with attach(model, OffloadConfig(**SMALL | settings)) as engine:
            if split:
                split_in_two(engine)
            cache = engine.new_cache()
            tokens = engine.generate(ids(150), max_new_tokens=NEW)
            assert len(engine.runtime.stages) == 1 + split
            cache.check_integrity()
            stats = engine.stats
            found.append((tokens.tolist(), stats.wanted_blocks, stats.ahead_blocks, stats.late_bytes, stats.steps))
            prefetchers = [stage.prefetcher for stage in engine.runtime.stages]
            assert all(isinstance(one, ThreadPrefetcher) and one._thread is not None for one in prefetchers)
        assert all(
            not one._thread.is_alive() for one in prefetchers if isinstance(one, ThreadPrefetcher) and one._thread
        )
    assert found[0] == found[1]


class TestDeviceMaps:
    def test_from_a_file(self, folder: Path, tmp_path: Path, ids: Callable[..., Any]) -> None:
        (tmp_path / "map.json").write_text(json.dumps(spread("cpu", "disk")))
        model = load_model(str(folder), device_map=str(tmp_path / "map.json"))
        assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
        with attach(model, OffloadConfig(**SMALL)) as engine:
            assert engine.generate(ids(150), max_new_tokens=2).shape == (1, 152)

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            ("everywhere", "expected auto, balanced, sequential, or a JSON file"),
            ("[1]", "expected an object of modules and devices"),
            ("{}", "expected an object of modules and devices"),
            ('{"lm_head": 1.5}', "'lm_head' is on 1.5, expected a device"),
            ('{"lm_head": "gpu"}', "device='gpu' can't be used"),
            ("{", "is not JSON"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, given: str, reason: str) -> None:
        if given != "everywhere":
            (tmp_path / "map.json").write_text(given)
            given = str(tmp_path / "map.json")
        with pytest.raises(ConfigError, match=reason) as caught:
            read_device_map(given)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("options", "found"), [({"ranks": 2}, "2 processes"), ({"dtype": "packed"}, "'packed'")])
    def test_what_goes_with_none(self, folder: Path, options: dict[str, Any], found: str) -> None:
        with pytest.raises(ConfigError, match=f"spreads whole, unpacked models in one process: found .*{found}"):
            load_model(str(folder), device_map="auto", **options)

    def test_on_the_command_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ["generate", "--prompt", "some words", "--max-new-tokens", "3", "--budget", "256"]
        assert main([*command, "--device", "cpu"]) == 0
        alone = capsys.readouterr().out
        (tmp_path / "map.json").write_text(json.dumps({"": "cpu"}))
        assert main([*command, "--device-map", str(tmp_path / "map.json")]) == 0
        assert capsys.readouterr().out == alone
        assert main([*command, "--device-map", "auto", "--device", "cpu"]) == 2
        assert "takes the place of --device" in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        assert main([*command, "--device-map", "auto"]) == 2
        assert "spreads the model of one process, found 2 processes" in capsys.readouterr().err


@pytest.fixture(params=["weights brought from the CPU", "half on the CPU", pytest.param("two GPUs", marks=two_gpus)])
def over_gpus(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[PreTrainedModel, list[torch.device]]]:
    """A model on a GPU and a CPU, or on two GPUs, and the devices of its stages."""
    if request.param == "two GPUs":
        yield loaded(folder, device_map=spread(0, 1)), [FIRST, SECOND]
    elif request.param == "half on the CPU":
        # accelerate alone would bring those weights to the GPU: the main device says that they stay.
        yield accelerate.dispatch_model(loaded(folder), spread(0, "cpu"), main_device="cpu"), [FIRST, CPU]
    else:
        yield loaded(folder, device_map=spread(0, "cpu")), [FIRST]


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_matmul")
class TestOnGPUs:
    @pytest.mark.parametrize("policy", ["predictor", "quest", "snapkv", "cake", "full"])
    def test_the_stock_models_tokens(self, over_gpus: Any, folder: Path, ids: Callable[..., Any], policy: str) -> None:
        model, devices = over_gpus
        given = {"max_new_tokens": NEW, "do_sample": False}
        prompt = ids(300, 2).to(FIRST)
        stock = model.generate(prompt, **given)
        with attach(model, OffloadConfig(policy=policy, budget=4096)) as engine:
            assert torch.equal(model.generate(prompt, **given), stock)
            assert torch.equal(engine.generate(prompt.cpu(), max_new_tokens=NEW), stock)
            assert [stage.device for stage in engine.runtime.stages] == devices
            assert engine.device == FIRST
            stats = engine.stats
            assert stats.prefetch.startswith("thread: ")
            assert stats.captured_steps == 0
            assert any("in place of captured steps" in one for one in stats.fallbacks) == (policy != "full")
        assert torch.equal(model.generate(prompt, **given), stock)

    def test_layers_that_are_not_offloaded_and_padding(self, over_gpus: Any, ids: Callable[..., Any]) -> None:
        model, _ = over_gpus
        given = padded(ids(300, 2).to(FIRST))
        stock = model.generate(**given)
        with attach(model, OffloadConfig(budget=4096, skip_layers=(0, 3))):
            assert torch.equal(model.generate(**given), stock)

    @pytest.mark.parametrize("settings", [{}, {"budget_allocation": "cake-heads"}, {"policy": "quest"}])
    def test_the_selection_of_one_gpu(
        self, over_gpus: Any, folder: Path, ids: Callable[..., Any], settings: dict[str, Any]
    ) -> None:
        """Sparse steps give what they give on one GPU; a CPU's scores differ in their last bits, and so may choices."""
        model, devices = over_gpus
        found = []
        for one in (loaded(folder).to(FIRST), model):
            with attach(one, OffloadConfig(**SMALL | settings, prefetch="thread")) as engine:
                tokens = engine.generate(ids(300), max_new_tokens=40)
                stats = engine.stats
                found.append([stats.steps, stats.wanted_blocks])
                if CPU not in devices:
                    found[-1] += [stats.ahead_blocks, stats.late_bytes, tokens.tolist()]
        assert found[0][: len(found[1])] == found[1]

    def test_a_cache_is_cropped_copied_and_freed(self, over_gpus: Any, ids: Callable[..., Any]) -> None:
        model, _ = over_gpus
        prompt = ids(300).to(FIRST)
        with attach(model, OffloadConfig(**SMALL)) as engine, torch.no_grad():
            cache = engine.new_cache()
            model(prompt, **with_cache(model, cache))
            for one in (cache, copy.deepcopy(cache)):
                model(prompt[:, :1], **with_cache(model, one))
                one.crop(-1)
                model(prompt[:, :1], **with_cache(model, one))
                one.check_integrity()
            del cache, one
            assert engine.runtime.memory.lent_bytes == 0
