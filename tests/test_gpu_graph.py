"""Captured steps on a CUDA device: the contracts that they have to keep."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor

from attention_predictor import OffloadConfig, attach
from attention_predictor.offload.blocks import host_memory
from attention_predictor.offload.blocks.layer_blocks import LayerBlocks
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policy_names import BUILT_IN
from attention_predictor.offload.step.schedule import StreamSchedule
from attention_predictor.predictor.model import WindowPredictor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_matmul")]
SMALL = {"budget": 96, "sink": 32, "recent": 32}


def decode(model, prompt: Tensor, tokens: int, **settings: object) -> tuple[object, dict]:
    mask = torch.ones_like(prompt)
    with attach(model, OffloadConfig(**settings)) as engine:
        out = model.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out, engine.stats.to_dict()


def captured(stats: dict) -> bool:
    """Whether steps were captured; where not, the reason is one of those that a family has."""
    if not stats["fallbacks"]:
        return True
    (reason,) = stats["fallbacks"]
    assert "head size" in reason or "nothing is" in reason
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_when_the_budget_covers_the_context(tiny_model, ids, family: str) -> None:
    model, prompt = tiny_model(family).cuda(), ids(150).cuda()
    stock = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=24,
        min_new_tokens=24,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ours, stats = decode(model, prompt, 24, prefetch="graph")
    captured(stats)
    assert torch.equal(ours.sequences, stock.sequences)
    assert max((a - b).abs().max() for a, b in zip(ours.logits, stock.logits, strict=True)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss", "ministral", "qwen3-moe", "mixtral", "llama4"])
def test_layers_and_experts_of_several_kinds(tiny_model, ids, family: str, dtype: torch.dtype) -> None:
    """300 tokens with one sequence padded: windows turn, the room grows, the host looks at everything, steps go on."""
    model, prompt = tiny_model(family).to("cuda", dtype), ids(300, batch=2).cuda()
    mask = torch.ones(2, 600, dtype=torch.int64, device="cuda")
    mask[1, :37] = 0
    found = []
    for prefetch in ("graph", "none"):
        with attach(model, OffloadConfig(prefetch=prefetch, budget=1024)) as engine:
            given = with_cache(model, engine.new_cache())
            position = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = [
                model(prompt, attention_mask=mask[:, :300], position_ids=position[:, :300], **given).logits[:, -1]
            ]
            for step in range(300, 600):
                # The tokens of the captured steps in both: rounding may turn one.
                token = (logits if prefetch == "graph" else found[0])[step - 300].argmax(-1, keepdim=True)
                step_mask, step_position = mask[:, : step + 1], position[:, step : step + 1]
                logits.append(model(token, attention_mask=step_mask, position_ids=step_position, **given).logits[:, -1])
                if step % 100 == 50:
                    next(iter(given.values())).check_integrity()
            assert not engine.stats.fallbacks
            assert engine.stats.captured_steps == (300 if prefetch == "graph" else 0)
        found.append(torch.stack(logits))
    tolerance = 1e-3 if dtype == torch.float32 else 0.1 * float(found[1].abs().max())
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_skipped_layers_are_captured(tiny_model, ids) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300, batch=2).cuda()
    (graph, stats), (thread, _) = (
        decode(model, prompt, 60, prefetch=way, skip_layers=(0,), **SMALL) for way in ("graph", "thread")
    )
    assert captured(stats)
    assert torch.equal(graph.sequences, thread.sequences)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_threaded_and_synchronous_give_the_same_tokens(tiny_model, ids, family: str, batch: int) -> None:
    model, prompt = tiny_model(family).cuda(), ids(300, batch=batch).cuda()
    outputs = []
    for prefetch in ("graph", "thread", "none"):
        out, stats = decode(model, prompt, 60, prefetch=prefetch, **SMALL)
        assert not stats["fallbacks"]
        outputs.append(out.sequences)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


VARIANTS = [
    *({"policy": name} for name in BUILT_IN if name not in ("full", "oracle")),
    *({"predictor": name} for name in ("last", "ema", "mean", "paper")),
    {"late_fetch": 0.0, "reserve": 0.0},
    {"calibration": "none"},
    {"calibration": "exact", "calibration_interval": 7},
    {"measure_recovery": 7},
    {"kernels": "auto", "budget": 112},
    {"host_kv": "int8"},
    {"host_kv": "int4", "measure_recovery": 7},
    {"host_kv": "int8", "policy": "quest"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda given: "-".join(map(str, given.values())))
def test_every_policy_is_captured(tiny_model, ids, tmp_path, settings: dict) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300, batch=2).cuda()
    if settings.get("predictor") == "paper":
        torch.manual_seed(0)
        WindowPredictor().save(tmp_path)
        settings = {"predictor": str(tmp_path)}
    outputs = []
    for prefetch in ("graph", "thread"):
        out, stats = decode(model, prompt, 60, **SMALL | {"prefetch": prefetch} | settings)
        assert not stats["fallbacks"]
        outputs.append(out.sequences)
        by_host = 59 // 7 if {"calibration_interval", "measure_recovery"} & settings.keys() else 0
        assert stats["captured_steps"] == (59 - by_host if prefetch == "graph" else 0)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_stays_close(tiny_model, ids, family: str) -> None:
    model, prompt = tiny_model(family).to("cuda", torch.bfloat16), ids(300, batch=2).cuda()
    (graph, stats), (thread, _) = (decode(model, prompt, 8, prefetch=way, **SMALL) for way in ("graph", "thread"))
    assert captured(stats)
    assert (graph.logits[0] - thread.logits[0]).abs().max() < 1e-6  # of the prefill
    assert (graph.logits[1] - thread.logits[1]).abs().max() < 0.05 * thread.logits[1].abs().max()


def test_compiled_layers_give_the_same_tokens(tiny_model, ids) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300).cuda()
    graph, _ = decode(model, prompt, 40, prefetch="graph", **SMALL)
    compiled, stats = decode(model, prompt, 40, prefetch="graph", compile=True, **SMALL)
    assert captured(stats)
    assert torch.equal(graph.sequences, compiled.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_fused_modules_give_the_same_tokens(tiny_model, ids, family: str, dtype: torch.dtype) -> None:
    model, prompt = tiny_model(family).to("cuda", dtype), ids(300, batch=2).cuda()
    before = [dict(vars(module)) for module in model.modules()]
    fused, stats = decode(model, prompt, 40, prefetch="graph", **SMALL)
    plain, other = decode(model, prompt, 40, prefetch="graph", unfused=True, **SMALL)
    assert captured(stats)
    assert stats["captured_steps"] == other["captured_steps"] > 30
    assert stats["fused"] == f"{9 if family == 'qwen3' else 5} norms, 2 MLPs, 2 rotary embeddings"
    assert other["fused"] == ""
    assert [vars(module).keys() for module in model.modules()] == [one.keys() for one in before]
    if dtype == torch.float32:
        assert torch.equal(fused.sequences, plain.sequences)
    # A sum in another order may turn a rounding, and a token with it: until then logits differ by roundings.
    first, other_first = fused.logits[1], plain.logits[1]
    assert (first - other_first).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * other_first.abs().max()


def test_beams_go_by_the_thread(tiny_model, ids) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(200).cuda()
    outputs = []
    for prefetch in ("graph", "thread"):
        with attach(model, OffloadConfig(prefetch=prefetch, **SMALL)) as engine:
            outputs.append(model.generate(prompt, do_sample=False, num_beams=3, max_new_tokens=20))
    assert torch.equal(*outputs)
    assert engine.stats.fallbacks == {}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_many_tokens_with_integrity_checks(tiny_model, ids, family: str) -> None:
    """10,000 tokens, across the growth of the room, the host looking at everything every 500 of them."""
    check_many_tokens(tiny_model(family, max_position_embeddings=20000).cuda(), ids, host_kv="auto")


@torch.no_grad()
@pytest.mark.parametrize("host_kv", ["int8", "int4"])
def test_many_tokens_of_codes_with_integrity_checks(tiny_model, ids, host_kv: str) -> None:
    """Every resident block is what the codes in host memory decode to, by torch operations on the host."""
    check_many_tokens(tiny_model("llama", max_position_embeddings=20000).cuda(), ids, host_kv=host_kv)


def check_many_tokens(model, ids, **settings: object) -> None:
    with attach(model, OffloadConfig(prefetch="graph", **SMALL, **settings)) as engine:
        cache = engine.new_cache()
        token = model(ids(300, batch=2).cuda(), **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        for step in range(10_000):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            if step % 500 == 499:
                cache.check_integrity()
        assert cache.get_seq_length() == 10_300
        assert not engine.stats.fallbacks
        assert engine.stats.steps == 10_000
        assert engine.stats.captured_steps == 10_000


@torch.no_grad()
def test_random_delays_on_both_streams_change_nothing(tiny_model, ids, monkeypatch) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300).cuda()
    generator = torch.Generator().manual_seed(0)
    append, estimate, ahead = (
        LayerBlocks.append_token,
        StreamSchedule.on_sketch_stream,
        StreamSchedule.on_prefetch_stream,
    )

    def sleep() -> None:
        torch.cuda._sleep(int(torch.randint(1_000_000, (1,), generator=generator)))

    def slow_append(self, *args):
        sleep()
        append(self, *args)
        sleep()

    def slow(context):
        enter = context.__enter__
        context.__enter__ = lambda: (enter(), sleep())
        return context

    def run() -> Tensor:
        with attach(model, OffloadConfig(prefetch="graph", **SMALL)) as engine:
            cache = engine.new_cache()
            out = [model(prompt, **with_cache(model, cache)).logits[:, -1:].argmax(-1)]
            for step in range(120):
                out.append(model(out[-1], **with_cache(model, cache)).logits[:, -1:].argmax(-1))
                if step % 30 == 29:  # leaves: other delays are captured
                    cache.check_integrity()
            return torch.cat(out, 1)

    plain = run()
    monkeypatch.setattr(LayerBlocks, "append_token", slow_append)
    monkeypatch.setattr(StreamSchedule, "on_sketch_stream", lambda self: slow(estimate(self)))
    monkeypatch.setattr(StreamSchedule, "on_prefetch_stream", lambda self, held: slow(ahead(self, held)))
    assert torch.equal(run(), plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("allocation", "tokens"),
    [
        ("qsim", 245),
        ("cake", 245),
        ("qsim-heads", 245),
        ([80, 112], 245),
        ([80, 112], 60),  # from below the mean budget on, which is where the smaller one comes into effect
        ([(80, 112), (112, 80)], 245),
        ([(80, 112), (112, 80)], 60),
    ],
)
def test_captured_steps_have_the_same_unequal_budgets(tiny_model, ids, allocation, tokens: int) -> None:
    model, prompt, found = tiny_model("llama").cuda(), ids(tokens, batch=2).cuda(), []
    for prefetch in ("graph", "thread"):
        settings = SMALL | {"prefetch": prefetch, "budget_allocation": allocation}
        with attach(model, OffloadConfig(**settings)) as engine:
            cache = engine.new_cache()
            out = [model(prompt, **with_cache(model, cache)).logits[:, -1:].argmax(-1)]
            for _ in range(60):
                out.append(model(out[-1], **with_cache(model, cache)).logits[:, -1:].argmax(-1))
            cache.check_integrity()
            assert not engine.stats.fallbacks
            selections = [layer.selection for layer in cache.layers]
            by_head = [budget for one in selections for budget in one.heads or [one.budget] * 2]
            found.append((torch.cat(out, 1).tolist(), by_head))
    assert found[0] == found[1]
    assert sum(found[0][1]) == 4 * 96


def test_a_model_that_asks_the_host_goes_by_the_thread(tiny_model, ids, monkeypatch) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300).cuda()
    thread, _ = decode(model, prompt, 20, **SMALL)
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    # An argument more than a gated MLP has: else it is recognised as one, and a kernel that asks nothing does it.
    monkeypatch.setattr(mlp, "forward", lambda self, x, *_: forward(self, x) * float(x.abs().max() > -1))
    graph, stats = decode(model, prompt, 20, prefetch="graph", **SMALL)
    assert torch.equal(graph.sequences, thread.sequences)
    (reason,) = stats["fallbacks"]
    assert "LlamaForCausalLM can't be captured" in reason
    assert torch.rand(3, device="cuda").isfinite().all()  # random numbers are there as before


def test_the_shortest_loop_gives_the_same_tokens(tiny_model, ids) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300, batch=2).cuda()
    wanted, _ = decode(model, prompt, 50, **SMALL)
    with attach(model, OffloadConfig(prefetch="graph", **SMALL)) as engine:
        found = engine.generate(prompt, max_new_tokens=50, eos_token_id=[])
        assert not engine.stats.fallbacks
    assert torch.equal(found, wanted.sequences)


@pytest.mark.timeout(600)
def test_prediction_earns_its_place(earned_place) -> None:
    """100 answers a cell of the pocket model, in captured steps."""
    earned_place(answers=100, device="cuda", spare=0, ahead=0.95, prefetch="graph")


@pytest.mark.timeout(300)
def test_a_budget_that_kernels_cannot_hold_is_decided_before_capture(tiny_model, ids) -> None:
    """Choosing among slots takes shared memory, of which there is so much; nothing is lost in the middle."""
    model = tiny_model("llama", head_dim=64, max_position_embeddings=70000).to("cuda", torch.bfloat16)
    prompt, settings = ids(60000).cuda(), {"budget": 48 * 1024, "reserve": 0.0}
    thread, _ = decode(model, prompt, 6, prefetch="thread", **settings)
    auto, stats = decode(model, prompt, 6, reserve=0.5, **{k: v for k, v in settings.items() if k != "reserve"})
    assert auto.sequences.shape == thread.sequences.shape
    assert not stats["fallbacks"]
    assert stats["captured_steps"] == stats["steps"] == 5


@pytest.mark.parametrize("refused", ["all", "some"])
def test_host_memory_that_cannot_be_pinned_serves_all_the_same(tiny_model, ids, monkeypatch, refused: str) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(900).cuda()
    pinned, _ = decode(model, prompt, 24, **SMALL)
    register, calls = host_memory._register, []

    def refuse(*args: int) -> int:
        calls.append(args)
        return 2 if refused == "all" or len(calls) > 1 else register(*args)

    monkeypatch.setattr(host_memory, "_register", refuse)
    pageable, stats = decode(model, prompt, 24, slab_blocks=16, **SMALL)
    assert calls
    assert torch.equal(pageable.sequences, pinned.sequences)
    assert any("host memory can't be pinned" in message for message in stats["fallbacks"])
    assert any("they need pinned host memory" in message for message in stats["fallbacks"])
    torch.cuda.synchronize()


def test_defaults_are_captured_and_say_so(tiny_model, ids) -> None:
    """By plain `generate`, and by the loop of its own; requests one after another hold no more memory."""
    model, prompt = tiny_model("llama").cuda(), ids(900).cuda()
    with attach(model, OffloadConfig(**SMALL)) as engine:
        held = []
        for _ in range(4):
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
            engine.generate(prompt, max_new_tokens=20, eos_token_id=[])
            held.append(engine.runtime.memory.held_bytes)
            assert engine.runtime.memory.lent_bytes == 0
        assert len(set(held)) == 1
        assert engine.stats.captured_steps == engine.stats.steps == 8 * 19
        assert not engine.stats.fallbacks
        assert "captured steps" in str(engine.stats)


def test_a_mask_that_changes_is_seen(tiny_model, ids) -> None:
    model, prompt = tiny_model("llama").cuda(), ids(300, batch=2).cuda()
    mask = torch.ones(2, 340, dtype=torch.int64, device="cuda")
    mask[1, :37] = 0
    outputs = []
    for prefetch in ("none", "auto"):
        with attach(model, OffloadConfig(**SMALL, prefetch=prefetch)) as engine, torch.no_grad():
            given = with_cache(model, engine.new_cache())
            logits = [model(prompt, attention_mask=mask[:, :300], **given).logits[:, -1]]
            for step in range(30):
                seen = mask[:, : 301 + step].clone()
                if 12 <= step < 15:
                    seen[0, 60:90] = 0
                logits.append(model(prompt[:, step : step + 1], attention_mask=seen, **given).logits[:, -1])
            outputs.append(torch.stack(logits))
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-3, rtol=1e-2)
    assert engine.stats.captured_steps == 27
