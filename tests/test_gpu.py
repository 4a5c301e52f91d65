"""The same contracts on a CUDA device: pinned memory, a stream of its own, and the prefetch thread."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_models import FAMILIES

from attention_predictor import OffloadConfig, attach
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policy_names import BUILT_IN
from attention_predictor.predictor.sketch import KeySketch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_matmul")]
SMALL = {"predictor": "ema", "budget": 64, "sink": 16, "recent": 16}


def decode(model, prompt, tokens=24):
    return model.generate(
        prompt, do_sample=False, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_when_the_budget_covers_the_context(tiny_model, ids, family):
    model, prompt = tiny_model(family).cuda(), ids(150).cuda()
    stock = decode(model, prompt)
    with attach(model, OffloadConfig(predictor="ema")):
        ours = decode(model, prompt)
    assert torch.equal(ours.sequences, stock.sequences)
    assert max((a - b).abs().max() for a, b in zip(ours.logits, stock.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("policy", BUILT_IN)
def test_threaded_and_synchronous_give_the_same_tokens(tiny_model, ids, policy):
    model, prompt = tiny_model("llama").cuda(), ids(300, batch=3).cuda()
    outputs = []
    for prefetch in ("thread", "none", "thread"):
        with attach(model, OffloadConfig(policy=policy, prefetch=prefetch, **SMALL)):
            outputs.append(decode(model, prompt, 40).sequences)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integrity_while_decoding(tiny_model, ids, dtype):
    model, prompt = tiny_model("qwen3").to("cuda", dtype), ids(300, batch=2).cuda()
    with attach(model, OffloadConfig(**SMALL)) as engine:
        cache = engine.new_cache()
        token = model(prompt, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        assert cache.layers[0].blocks.store.gather(torch.tensor([0]), torch.tensor([0])).device.type == "cpu"
        assert all(slab.is_pinned() for slabs in cache.layers[0].blocks.store._slabs for slab in slabs)
        for step in range(200):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            if step % 10 == 0:
                cache.check_integrity()
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
        cache.crop(-5)
        cache.check_integrity()


@torch.no_grad()
def test_random_delays_on_both_streams_change_nothing(tiny_model, ids, monkeypatch):
    """Slow work on either stream must not let a block be read before it has come, or evicted before it is read."""
    model, prompt = tiny_model("llama").cuda(), ids(300).cuda()
    generator = torch.Generator().manual_seed(0)

    def run(slow: bool) -> torch.Tensor:
        with attach(model, OffloadConfig(**SMALL)) as engine:
            cache = engine.new_cache()
            out = [model(prompt, **with_cache(model, cache)).logits[:, -1:].argmax(-1)]
            for layer in cache.layers:
                move, attend = layer.blocks._move, layer.attend

                def delayed(call, *args):
                    if slow:
                        torch.cuda._sleep(int(torch.randint(2_000_000, (1,), generator=generator)))
                    return call(*args)

                monkeypatch.setattr(layer.blocks, "_move", lambda *args, call=move: delayed(call, *args))
                monkeypatch.setattr(layer, "attend", lambda *args, call=attend: delayed(call, *args))
            for _ in range(40):
                out.append(model(out[-1], **with_cache(model, cache)).logits[:, -1:].argmax(-1))
            for layer in cache.layers:
                monkeypatch.undo()
                layer.check_integrity()
            return torch.cat(out, 1)

    assert torch.equal(run(slow=False), run(slow=True))


def test_device_memory_of_a_long_context(tiny_model, ids):
    """Once the prefill is over, the device holds pool, sketch and history, and nothing else that grows."""

    def allocated() -> int:
        gc.collect()  # other tests' models
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB, made when they are first needed
        return torch.cuda.memory_allocated()

    model = tiny_model("llama", max_position_embeddings=40000, head_dim=64).to("cuda", torch.bfloat16)
    with torch.no_grad(), attach(model, OffloadConfig(predictor="ema", budget=512)) as engine:
        before = allocated()
        cache = engine.new_cache()
        token = model(ids(32000).cuda(), **with_cache(model, cache), logits_to_keep=1).logits[:, -1:].argmax(-1)
        for _ in range(5):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        grown = allocated() - before
        stats = engine.stats
        assert stats.device_kv_bytes <= grown <= stats.device_kv_bytes + (4 << 20)
        assert grown < stats.full_kv_bytes / 5


@pytest.mark.timeout(600)
def test_prediction_earns_its_place(earned_place):
    """100 answers a cell; on a CPU, test_pocket.py asks fewer."""
    earned_place(answers=100, device="cuda", spare=0, ahead=0.95)


def test_sketch_is_the_same_on_both_devices():
    torch.manual_seed(0)
    key, query = torch.randn(1, 2, 500, 64), torch.randn(1, 6, 64)
    logits = []
    for device in ("cpu", "cuda"):
        sketch = KeySketch(batch=1, kv_heads=2, head_dim=64, dtype=torch.float32, device=torch.device(device))
        sketch.extend(key.to(device), query[:, :, None].to(device))
        logits.append(sketch.logits(query.to(device), 0.125).cpu())
    assert (logits[0] - logits[1]).abs().max() < 1e-4
