"""attnpred bench: every part runs at a tiny size and gives figures of the right form; times are never judged."""

from __future__ import annotations

import functools
import gc
import json
import re
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.csrc.ops import every_kernel
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.bench import cache_sessions as cache_sessions
from attention_predictor.eval.bench import decode_timing as decode_timing
from attention_predictor.eval.bench import synthetic_cache
from attention_predictor.eval.bench.breakdown import STAGES, SUMS, breakdown, covered, short_name, stage_of, summed
from attention_predictor.eval.bench.capture_status import how_taken, why_not_captured
from attention_predictor.eval.bench.comparison import breakdown_lines, compare
from attention_predictor.eval.bench.perplexity import FIGURES
from attention_predictor.eval.bench.random_models import SHAPES, random_model, shape_config
from attention_predictor.eval.bench.static_step import StaticStep, StockModelError, plain_static_cache
from attention_predictor.eval.bench.synthetic_cache import PAST, Locality, SyntheticCache
from attention_predictor.eval.bench.throughput import most
from attention_predictor.eval.bench.timings_file import TimingsFile
from attention_predictor.offload.attention.dense import scaled_logits
from attention_predictor.offload.blocks import host_memory, room
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policy_names import BUILT_IN

CPU = torch.device("cpu")
LAYER = ["--kv-heads", "2", "--heads", "4", "--repeats", "2", "--json"]
PARTS = {
    "attention": ["--head-dim", "32", "--budget", "128"],
    "sketch": ["--head-dim", "32", "--context", "600"],
    "gather": ["--head-dim", "32", "--context", "600", "--blocks", "20"],
    "predictor": ["--tokens", "512,1024", "--layers", "3"],
}
NORMS = "norms and activations"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def layer_options(part: str) -> list[str]:
    options = LAYER if part != "gather" else [one for one in LAYER if one not in ("--heads", "4")]
    return [*options, *PARTS[part]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", PARTS)
def test_parts(part: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", part, "--device", device, *layer_options(part)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["part"] == part
    assert found["timings"][0]["name"].startswith("ours")
    timed = [one for one in found["timings"] if "skipped" not in one]
    assert all(one["ms"] > 0 and one["eager_ms"] > 0 and one["ratio"] > 0 for one in timed)
    assert timed[0]["ratio"] == 1
    if part == "predictor":
        assert {one["tokens"] for one in timed} == {512, 1024}
        assert all(one["token_ms"] == pytest.approx(3 * one["ms"]) for one in timed)
    else:
        assert all(one["gb_per_s"] > 0 for one in timed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("host_kv", ["int8", "int4"])
def test_coded_blocks_are_moved(device: str, host_kv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gather", "--device", device, "--host-kv", host_kv, *layer_options("gather")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["host_kv"] == host_kv
    assert all(one["gb_per_s"] > 0 for one in found["timings"])


def test_flashinfer_is_asked_for_where_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--device", "cpu", *layer_options("attention")]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["timings"]}
    assert rows["FlashInfer's paged decode, without"]["skipped"] == "it needs a CUDA device"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["attention", "--heads", "3", "--kv-heads", "2"], "--heads 3: expected a multiple of --kv-heads 2"),
        (["gather", "--blocks", "0"], "--blocks 0: expected at least 1"),
        (["predictor", "--tokens", "16"], "--tokens 16: expected at least 144"),
        (["predictor", "--layers", "0"], "--layers 0: expected at least 1"),
        (["decode", "--steps", "0"], "--steps 0: expected at least 1"),
        (["decode", "--batch", "0"], "--batch 0: expected at least 1"),
        (["policies", "--policies", "predictor,best"], "policy='best' is not allowed: expected one of full, "),
        (["policies", "--context", "100", "--shape", "tiny"], "--context 100: expected at least 112, for steps and 64"),
        (["perplexity", "--tail", "10"], "--tail 10: expected at least 11"),
        (["perplexity", "--context", "64"], "--tail 64: expected less than --context 64"),
        (["generate", "--new-tokens", "9"], "--new-tokens 9: expected at least 10"),
        (
            ["stream", "--lengths", "900,200", "--shape", "tiny"],
            "--lengths 900,200: expected the shortest and the longest",
        ),
        (["requests", "--new-tokens", "0"], "--new-tokens 0: expected at least 1"),
        (["requests", "--ways", "ours,theirs"], "--ways 'theirs' is not known: expected some of ours, device"),
        (["decode", "--context", "300", "--steps", "400"], "--context 300: expected at least 409, for the 408 steps"),
        (
            ["decode", "--synthetic", "--context", "80", "--steps", "9"],
            "--context 80: expected at least 81, for the 17",
        ),
        (["decode", "--shape", "llama"], "--shape 'llama' is not known: expected one of llama-3.1-8b, "),
        (["decode", "--ways", "thread,fast"], "--ways 'fast' is not known: expected some of floor, static, "),
        (["decode", "--ways", "offloaded"], "--ways offloaded: it needs a CUDA device, found cpu"),
        (["decode", "--budget", "20"], "--budget 20: expected at least"),
        (["decode", "--memory-limit", "24"], "--memory-limit 24.0: for CUDA devices, found cpu"),
        (["decode", "--plot", "times.txt"], "--plot times.txt: expected a name that ends in one of .png"),
        (
            ["decode", "--ways", "floor", "--steps", "1017", "--context", "2000"],
            "--steps 1017: too many for the floor's",
        ),
        (["throughput", "--batches", "1,0", "--shape", "tiny"], "--batches 1,0: expected numbers from 1 on"),
        (["stream", "--places", "0", "--shape", "tiny"], "--places 0: expected numbers from 1 on"),
        (["stream", "--lengths", "0,5", "--shape", "tiny"], "--lengths 0,5: expected numbers from 1 on"),
        (["decode", "--contexts=-512,512", "--shape", "tiny"], "--contexts -512,512: expected numbers from 1 on"),
        (["prefill", "--ways", "ours, fast"], "--ways 'fast' is not known: expected some of ours, bare, device"),
        (["prefill", "--ways", "ours, offloaded"], "--ways offloaded: it needs a CUDA device, found cpu"),
        (["throughput", "--ways", "floor,resident", "--shape", "tiny"], "--ways floor: its context is fixed"),
        (["throughput", "--host-kv", "int2", "--shape", "tiny"], "--host-kv int2: expected one of auto, int8, int4"),
        (["throughput", "--contexts", "100", "--shape", "tiny"], "--contexts 100: expected at least 112"),
        (["decode", "--dtype", "int8", "--shape", "tiny"], "--dtype int8: expected one of auto, "),
        (["decode", "--dtype", "packed", "--shape", "tiny"], "--dtype packed: --shape has weights of one of auto, "),
    ],
)
def test_bad_input_is_one_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *command, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"attnpred bench: {message}")
    assert error.count("\n") == 1


# Decoding


def decode(*options: str) -> list[str]:
    return ["bench", "decode", "--device", "cpu", "--budget", "160", "--steps", "2", *options]


@pytest.mark.slow
def test_decode_behind_a_prefill(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--context", "300", "--batch", "2", "--ways", "device,no-kernels,thread"]
    assert main([*decode(*options), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["way"] for one in found["timings"]] == ["thread", "no-kernels", "device"]
    assert all(0 < one["median_ms"] <= one["p95_ms"] for one in found["timings"])
    assert all(one["steps"] == 2 and one["to_ours"] > 0 for one in found["timings"])
    assert all(one["breakdown"]["stages_ms"]["linear layers"] > 0 for one in found["timings"])
    ours, *_, stock = found["timings"]
    assert ours["to_ours"] == 1
    assert ours["engine"]["steps"] == 2  # the timed ones alone
    assert ours["engine"]["fallbacks"] == {}
    assert ours["engine"]["device_kv_parts"].keys() == {"pool", "table", "sketch", "history"}
    assert "engine" not in stock
    assert found["settings"]["synthetic"] is False


@pytest.mark.slow
def test_a_sweep_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "new" / "rows.jsonl", tmp_path / "times.png"
    options = ["--shape", "tiny", "--synthetic", "--out", str(out)]
    assert main(decode(*options, "--contexts", "512", "--ways", "thread")) == 0
    before = out.read_text()
    out.write_text(before + '{"way": "device", "context": 51')  # cut off in the writing
    both = [*options, "--contexts", "512,1024", "--plot", str(plot)]
    assert main([*decode(*both), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["timings"]
    assert [(one["way"], one["context"]) for one in rows] == [
        (setup, context) for context in (512, 1024) for setup in ("thread", "device")
    ]
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == 1 + 4
    assert plot.stat().st_size > 1000
    assert all(0 < one["query_similarity"] < 1 for one in rows)
    assert main(decode(*options, "--contexts", "512", "--ways", "thread", "--seed", "1")) == 2
    assert "holds timings with other settings (seed: 0 there, 1 asked for)" in capsys.readouterr().err
    assert main(decode(*both)) == 0  # nothing left to do
    text = capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 1 + 4
    assert "ours, thread" in text
    assert "1.00 × ours" in text
    assert re.search(r"\d (bytes|KiB|MiB) fetched", text)


def test_what_does_not_fit_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = namedtuple("memory", "available")(3 << 20)  # for a slab in each layer, but not for two
    monkeypatch.setattr(cache_sessions.psutil, "virtual_memory", lambda: memory)
    for module in (host_memory, room):
        monkeypatch.setattr(module, "SPARE_BYTES", 0)
    out = tmp_path / "rows.jsonl"
    options = ["--shape", "tiny", "--synthetic", "--context", "2048", "--out", str(out)]
    assert main([*decode(*options), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert rows[0]["skipped"].startswith("the KV cache of 1 × 2048 tokens needs")
    assert "of host memory, 3.00 MiB are available" in rows[1]["skipped"]
    assert len(out.read_text().splitlines()) == 1  # tried again the next time
    assert main(decode(*options)) == 0
    assert re.search(r"\n  1 × 2048 tokens +stock cache on the device +skipped: keys and", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("way", "at_once", "in_window"), [("device", 1, 64), ("device", 400, 463), ("floor", 9, 64), ("static", 9, 1000)]
)
def test_what_a_stock_cache_takes_is_counted_by_layer(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, way: str, at_once: int, in_window: int
) -> None:
    """Layers with a window keep little of a context of 1,000 tokens, but the prompt that filled them."""
    model = tiny_model("gemma3", sliding_window=64)
    token_bytes = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    windows = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert 0 < sum(windows) < len(windows)
    tokens = [in_window if windowed else 1000 for windowed in windows]
    needed = 3 * token_bytes * (sum(tokens) + max(tokens))
    sizes = {"context": 1000, "batch": 3, "at_once": at_once, "limit_bytes": None}
    for available, fits in ((needed, True), (needed - 1, False)):
        memory = namedtuple("memory", "available")(available)
        monkeypatch.setattr(cache_sessions.psutil, "virtual_memory", lambda memory=memory: memory)
        assert (cache_sessions.why_too_large(model, cache_sessions.CACHE_SETUPS[way], **sizes) is None) == fits


def test_resident_steps_are_the_stock_models(model: PreTrainedModel) -> None:
    """Each takes another token behind the same prompt."""
    ids = torch.randint(512, (2, 70), generator=torch.Generator().manual_seed(0))
    prompt, tokens = ids[:, :64], ids[:, 64:].split(1, 1)
    setup = cache_sessions.CACHE_SETUPS["resident"]
    before = model.config._attn_implementation
    with torch.no_grad():
        with cache_sessions.open_cache(model, setup, context=100, batch=2, config=OffloadConfig(budget=160)) as session:
            model(prompt, **with_cache(model, session.cache))
            found = [session.step(token).clone() for token in tokens]
            assert session.facts() == {"attention": "torch's choice", "captured": False}
            assert session.cache.get_seq_length() == 65
        assert model.config._attn_implementation == before
        for token, logits in zip(tokens, found, strict=True):
            wanted = model(torch.cat([prompt, token], 1)).logits[:, -1:]
            torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)


def test_resident_refuses_windows(tiny_model) -> None:
    setup = cache_sessions.CACHE_SETUPS["resident"]
    with (
        pytest.raises(StockModelError, match="layer 0 keeps a DynamicSlidingWindowLayer: resident"),
        cache_sessions.open_cache(
            tiny_model("mistral-sliding"), setup, context=100, batch=1, config=OffloadConfig(budget=160)
        ),
    ):
        pass


def test_stream(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["bench", "stream", "--device", "cpu", "--shape", "tiny", "--budget", "160", "--requests", "3"]
    assert main([*options, "--lengths", "150,300", "--new-tokens", "4", "--places", "1,2", "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)["timings"]
    assert (one["places"], two["places"], one["ratio"]) == (1, 2, 1.0)
    for row in (one, two):
        assert row["steps"] == 9  # of each, all but the first token, on a CPU by itself
        assert row["tokens_per_s"] == pytest.approx(12 / row["seconds"])
        assert 0 < row["first_s"] <= row["last_first_s"] <= row["seconds"]


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "rows.jsonl", tmp_path / "rates.png"
    options = ["bench", "throughput", "--device", "cpu", "--shape", "tiny", "--budget", "160", "--steps", "2"]
    options += ["--contexts", "512", "--batches", "1,2", "--host-kv", "int8", "--out", str(out), "--plot", str(plot)]
    assert main([*options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert [(row["way"], row["batch"]) for row in rows] == [
        (way, batch) for batch in (1, 2) for way in ("thread", "resident")
    ]
    assert all(row["tokens_per_second"] == 1000 * row["batch"] / row["median_ms"] for row in rows)
    assert all(row["largest_batch"] >= 2 for row in rows)
    most_resident = max(row["tokens_per_second"] for row in rows if row["way"] == "resident")
    assert all(row["to_resident"] == row["tokens_per_second"] / most_resident for row in rows)
    whole = rows[2]["engine"]["full_kv_bytes"] * 1024 / 512  # fp32, and host memory grows by 1,024 tokens
    assert rows[2]["engine"]["host_kv_bytes"] < 0.35 * whole
    assert plot.stat().st_size > 1000
    assert len(out.read_text().splitlines()) == 1 + 4
    assert main(options) == 0  # nothing left to do
    text = capsys.readouterr().out
    assert re.search(r"2 × 512 +all on the device, captured +[\d.]+ tokens/s, [\d.]+ × the most", text)
    assert "not captured: on a CPU" in text


def test_the_largest_number_that_fits() -> None:
    assert [most(lambda number, limit=limit: number <= limit) for limit in (0, 1, 13, 4096, 9999)] == [
        *(0, 1, 13, 4096, 4096)
    ]


@pytest.mark.slow
def test_the_compiled_floor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Traced as one graph; on a GPU it is compiled as well, which takes a CPU a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = ["--shape", "tiny", "--synthetic", "--context", "512", "--ways", "floor,device", "--json"]
    assert main(decode(*options)) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert [(one["way"], one["context"]) for one in rows] == [("floor", 1024), ("device", 512)]
    assert "to_floor" not in rows[0]
    assert rows[1]["to_floor"] == rows[1]["median_ms"] / rows[0]["median_ms"]


@pytest.mark.gpu
@pytest.mark.slow
def test_every_way_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--synthetic", "--contexts", "1024,4096", "--memory-limit", "8", "--json"]
    try:
        assert main(["bench", "decode", "--device", "cuda", "--budget", "256", "--steps", "6", *options]) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert {one["way"] for one in rows} == {
        name for name, setup in cache_sessions.CACHE_SETUPS.items() if setup.by_default
    }
    for one in rows:
        assert one["median_ms"] > 0
        assert one["breakdown"]["idle_ms"] >= 0
        assert one["breakdown"]["stages_ms"]["linear layers"] > 0
        assert one.get("engine", {}).get("fallbacks", {}) == {}


def test_rows_are_compared_at_their_context() -> None:
    rows: list[dict[str, Any]] = [
        {"way": "floor", "context": 1024, "median_ms": 2.0},
        {"way": "thread", "context": 1024, "median_ms": 4.0},
        {"way": "graph", "context": 4096, "skipped": "no memory"},
        {"way": "thread", "context": 4096, "median_ms": 5.0},
        {"way": "device", "context": 4096, "median_ms": 20.0},
    ]
    found = compare(rows)
    assert found[0] == rows[0]
    assert found[2] == rows[2]
    assert (found[1]["to_ours"], found[1]["to_floor"]) == (1.0, 2.0)
    assert (found[4]["to_ours"], found[4]["to_floor"]) == (4.0, 10.0)
    assert not any("to_static" in row for row in found)
    found = compare([*rows, {"way": "static", "context": 1024, "median_ms": 4.0}])
    assert (found[4]["to_floor"], found[4]["to_static"]) == (10.0, 5.0)
    assert found[5].keys() == {"way", "context", "median_ms"}


@pytest.mark.parametrize("text", ["times\n", "[1]\n", '{"settings": {}}\nx\n'])
def test_a_file_that_holds_no_timings(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="is not a file of timings"):
        TimingsFile(path, {})


# Where the time goes


def test_stages_by_kernel_names() -> None:
    names = {
        "void (anonymous namespace)::attend_slots<__nv_bfloat16, 128>(SparseDecode)": "attention",
        "score_groups(SketchScores, Layout)": "sketch",
        "fold_row(ObserveRow, float, float)": "history",
        "score_tiles(PredictBlocks)": "predictor",
        "select_blocks_kernel(Select)": "selection",
        "move_blocks_kernel(Move)": "gather",
        "append_token_kernel(Append)": "gather",
        "move_coded_blocks_nv_bfloat16_8_kernel": "gather",
        "rms_norm_nv_bfloat16_kernel": "fused modules",
        "gate_up_half_kernel": "fused modules",
        "rotate_nv_bfloat16_kernel": "fused modules",
        "attention_predictor::sparse_decode": "attention",
        "attention_predictor::gather_to_host": "gather",
        "void pytorch_flash::flash_fwd_splitkv_kernel<...>": "attention",
        "nvjet_tst_128x64_64x8_1x2_h_bz_TNT": "linear layers",
        "void gemvNSP_kernel<__nv_bfloat16>": "linear layers",
        "triton_tem_fused_mm_3": "linear layers",
        "aten::addmm": "linear layers",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "triton_red_fused_add_mean_mul_pow_rsqrt_1": "compiled layers",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel(…)>": NORMS,
    }
    assert {name: stage_of(name) for name in names} == names
    assert {stage for stage, _ in STAGES} == {part for parts in SUMS.values() for part in parts}


def test_every_kernel_of_a_step_has_a_stage() -> None:
    """A prompt's and the clock's have none."""
    without = {kernel.name for kernel in every_kernel() if stage_of(kernel.name) is None}
    assert without == {"reduce_logits_kernel", "note_time_kernel"}


def test_what_is_of_no_stage_stands_under_its_own_name() -> None:
    add = "at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>"
    multiply = "at::native::BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float> >"
    mean = "at::native::ReduceOp<float, at::native::MeanOps<float, float>, unsigned int, float, 4>"
    names = {
        f"void at::native::vectorized_elementwise_kernel<4, {add} >(int, {add})": (
            "vectorized_elementwise_kernel CUDAFunctor_add"
        ),
        f"void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<{multiply} >(…)>(int)": (
            "elementwise_kernel MulFunctor"
        ),
        f"void at::native::reduce_kernel<512, 1, {mean} >({mean})": "reduce_kernel MeanOps",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long>(…)": "indexSelectLargeIndex",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(…)": "sbtopk::gatherTopK",
        "aten::searchsorted": "aten::searchsorted",
        "reduce_logits_kernel(ReduceLogits)": "reduce_logits_kernel",
    }
    assert {name: stage_of(name) or short_name(name) for name in names} == names
    found = summed({"score_groups(…)": 2.0, "fold_row(…)": 1.0, "gemv": 4.0, "aten::mul": 0.5, "Memset (Device)": 0.25})
    assert found["sums_ms"] == {
        "selection, sketch, history, prediction": 3.0,
        "gather": 0.0,
        "copies": 0.25,
        "attention": 0.0,
        "the model's own": 4.0,
        "of no stage": 0.5,
    }
    assert list(found["stages_ms"]) == ["linear layers", "sketch", "history", "aten::mul", "copies"]
    shown = breakdown_lines(found | {"idle_ms": 0.125})
    assert shown[0].endswith("the model's own 4.00; of no stage 0.50; nothing 0.12")
    assert shown[1] == "ms in detail: linear layers 4.00; sketch 2.00; history 1.00; aten::mul 0.50; copies 0.25"
    assert breakdown_lines(summed({"gemv": 99.5, "aten::mul": 0.5}))[1].endswith("linear layers 99.50; 1 more 0.50")


def test_covered() -> None:
    assert covered([]) == 0
    assert covered([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0


def test_breakdown_on_a_cpu() -> None:
    weight = torch.randn(256, 256)

    def steps() -> None:
        for _ in range(2):
            torch.topk(weight @ weight, 3)

    found = breakdown(steps, 2, CPU)
    assert found is not None
    assert found.keys() == {"stages_ms", "sums_ms"}
    assert found["stages_ms"]["linear layers"] == found["sums_ms"]["the model's own"] > 0
    assert found["stages_ms"]["aten::topk"] > 0
    assert sum(found["stages_ms"].values()) == pytest.approx(sum(found["sums_ms"].values()))
    assert breakdown(lambda: None, 1, CPU) is None


# Models and caches that are made up


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen2.5-7b", 7_615_616_512),
        ("gemma-3-4b", 3_880_263_168),  # the language models of Gemma 3, without what sees images
        ("gemma-3-12b", 11_766_034_176),
        ("gpt-oss-20b", 20_914_757_184),
    ],
)
def test_published_shapes(name: str, parameters: int) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name, 1 << 19))
    assert sum(one.numel() for one in model.parameters()) == parameters
    assert model.config.max_position_embeddings == 1 << 19
    assert set(SHAPES) >= {"tiny", name}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(shape_config("tiny", 4096), CPU, torch.float32)


def made_up(model: PreTrainedModel, length: int, **settings: Any) -> tuple[SyntheticCache, Tensor]:
    """A cache's contents, and the ids of 6 steps behind it."""
    ids = torch.arange(PAST + 6, device=model.device)[None]
    return SyntheticCache(model, ids, length, **settings), ids[:, PAST:]


def test_random_models_are_reproducible_and_ids_related(model: PreTrainedModel) -> None:
    again = random_model(shape_config("tiny", 4096), CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    unit = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    near, far = (unit[:256] * unit[1:257]).sum(-1).mean(), (unit[:256] * unit[256:]).sum(-1).mean()
    assert 0.7 < near < 0.9
    assert 0.3 < far < near - 0.15
    related, _ = made_up(model, 600)
    unrelated = SyntheticCache(model, torch.arange(0, 490, 7)[None], 600)
    assert related.query_similarity() > unrelated.query_similarity() > 0.2


def test_every_cache_gets_the_same(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_cache, "CHUNK", 128)
    made, ids = made_up(model, 600, batch=2)
    stock = DynamicCache(config=model.config)
    made.fill(stock)
    with attach(model, OffloadConfig(budget=1024)) as engine:
        cache = engine.new_cache()
        made.fill(cache)
        for number, layer in enumerate(stock.layers):
            key, value = cache.layers[number].blocks.store.read(0, 600)
            assert torch.equal(key, layer.keys)
            assert torch.equal(value, layer.values)
        assert not torch.equal(stock.layers[0].keys[0], stock.layers[0].keys[1])
        cache.check_integrity()
        policy = cache.layers[0].policy
        assert policy.sketch.length == 600
        assert policy.history.started
        assert policy.history.n_blocks == 38
        with torch.no_grad():  # the budget holds everything: ours must say what the stock cache says
            found = [model(ids[:, i : i + 1].expand(2, 1), **with_cache(model, cache)).logits for i in range(6)]
            cache.check_integrity()
    with torch.no_grad():
        wanted = [model(ids[:, i : i + 1].expand(2, 1), **with_cache(model, stock)).logits for i in range(6)]
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_history_is_that_of_a_prefill(model: PreTrainedModel) -> None:
    """The last rows are the true softmax of the model's queries over the keys."""
    made, _ = made_up(model, 600)
    stock = DynamicCache(config=model.config)
    made.fill(stock)
    with attach(model, OffloadConfig(budget=160, predictor="last")) as engine:
        cache = engine.new_cache()
        made.fill(cache)
        state = cache.layers[1].policy.history._state_BGNC[:, :, :38, -1]
    query = made.queries[1][:, :, PAST - 1 : PAST]
    prob = scaled_logits(query, stock.layers[1].keys, made.terms[1]).softmax(-1)
    blocks = torch.nn.functional.pad(prob, (0, 8)).view(1, 2, 2, 38, 16).amax((2, 4))
    torch.testing.assert_close(state.float(), blocks, atol=1e-3, rtol=1e-2)


def test_attention_is_as_asked_for(model: PreTrainedModel) -> None:
    """A span's mean logit is its own at its time; all else is noise of the deviation asked for."""
    made, _ = made_up(model, 3000, locality=Locality(spans=20, noise=1.5))
    (key,) = (torch.cat([chunk.key_BGTD for chunk in made.chunks(0)], 2),)
    query_GXD = made.queries[0][0].float().unflatten(0, (2, 2)).flatten(1, 2)
    logit_GXT = made.terms[0].scaling * query_GXD @ key[0].mT
    largest_G = logit_GXT.amax((1, 2))
    assert bool((largest_G > 8).all())  # ln(.8 / .2 · 3000 · exp(1.5² / 2) / (16 · Σ 1 / rank)) is 6.5, the best's
    spread = logit_GXT.std(-1).median()
    assert 1.2 < spread < 2.2
    mass_GN = logit_GXT.softmax(-1)[..., : 187 * 16].unflatten(-1, (187, 16)).sum(-1)
    held = mass_GN.sort(-1, descending=True).values[..., :19].sum(-1)
    assert float(held.mean()) > 3 * 19 / 187  # a tenth of the blocks holds far more than a tenth


def test_synthetic_refuses_what_it_cannot_fill(tiny_model) -> None:
    ids = torch.zeros(1, PAST + 6, dtype=torch.long)
    with pytest.raises(ConfigError, match="MistralForCausalLM has no layer that attends to the whole context"):
        SyntheticCache(tiny_model("mistral-sliding"), ids, 600)
    with pytest.raises(ConfigError, match="at least 64 tokens, found 60"):
        SyntheticCache(tiny_model("llama"), ids, 60)


@pytest.mark.slow
def test_a_way_leaves_nothing_behind(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is gone before memory is released for the next way."""
    caches: list[weakref.ref] = []
    fill = SyntheticCache.fill
    monkeypatch.setattr(
        SyntheticCache, "fill", lambda made, cache: (caches.append(weakref.ref(cache)), fill(made, cache))
    )
    found: list[bool] = []
    monkeypatch.setattr(decode_timing, "release", lambda device: (gc.collect(), found.append(caches[-1]() is None)))
    ids = torch.arange(600)[None] % 512
    steps = decode_timing.steps_within(1)
    made = SyntheticCache(model, ids[:, : PAST + steps], 600 - steps)
    work = decode_timing.Workload(ids, steps=1, batch=1, config=OffloadConfig(budget=160), seconds=9.0, synthetic=made)
    for setup in ("thread", "device"):
        assert decode_timing.time_setup(model, cache_sessions.CACHE_SETUPS[setup], work)["median_ms"] > 0
    assert found == [True, True]
    assert getattr(model, "_attention_predictor_engine", None) is None


# Layers with a window


HYBRIDS = ["tiny-gemma-3", "tiny-gpt-oss"]


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(shape_config(request.param, 8192), CPU, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("length", [100, 400])  # before the window of 128 is full, and after
def test_hybrid_caches_get_the_same(hybrid: PreTrainedModel, length: int) -> None:
    made, ids = made_up(hybrid, length, batch=2)
    assert sorted([*made.queries, *made.windows]) == list(range(hybrid.config.num_hidden_layers))
    stock, static = DynamicCache(config=hybrid.config), plain_static_cache(hybrid, 512)
    made.fill(stock)
    made.fill(static)
    with attach(hybrid, OffloadConfig(budget=1024)) as engine:
        cache = engine.new_cache()
        made.fill(cache)
        cache.check_integrity()
        assert all(layer.get_seq_length() == length for layer in (*cache.layers, *stock.layers, *static.layers))
        for number, window in made.windows.items():
            assert cache.layers[number].keys.shape[2] == min(window - 1, length)
            assert torch.equal(cache.layers[number].values, stock.layers[number].values)
        tokens = [ids[:, i : i + 1].expand(2, 1) for i in range(6)]
        ours = [hybrid(token, **with_cache(hybrid, cache)).logits for token in tokens]
    wanted = torch.cat([hybrid(token, **with_cache(hybrid, stock)).logits for token in tokens])
    step = StaticStep(hybrid, static, 512, batch=2)
    torch.testing.assert_close(torch.cat(ours), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([step(token) for token in tokens]), wanted, atol=1e-4, rtol=1e-4)


def test_static_steps_of_a_model_of_one_kind(tiny_model) -> None:
    """A mask is a tensor for these, whether they slide or not; behind a prefill."""
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    for family in ("llama", "mistral-sliding", "gemma2"):
        one = tiny_model(family)
        cache = plain_static_cache(one, 64)
        with torch.no_grad():
            one(ids[:, :50], **with_cache(one, cache))
            wanted = one(ids).logits[:, 50:]
        step = StaticStep(one, cache, 64, batch=1)
        found = torch.cat([step(token) for token in ids[:, 50:].split(1, 1)], 1)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_every_policy_is_told_of_a_made_up_prompt(hybrid: PreTrainedModel) -> None:
    """As a prompt tells it: what it remembers has the prompt's blocks, and budgets of the prompt's are shared."""
    made, ids = made_up(hybrid, 600)
    for name in BUILT_IN:
        with attach(hybrid, OffloadConfig(budget=192, policy=name)) as engine, torch.no_grad():
            cache = engine.new_cache()
            made.fill(cache)
            cache.check_integrity()
            tiered = [cache.layers[number] for number in made.queries]
            for i in range(3):
                hybrid(ids[:, i : i + 1], **with_cache(hybrid, cache))
            cache.check_integrity()
            selecting = name != "full"
            parts = engine.stats.device_kv_parts()
            assert bool(parts.get("pool")) == selecting, (name, parts)
            assert engine.stats.steps == 3
            budgets = engine.stats.to_dict()["layer_budgets"]
            assert sum(budgets) == 192 * len(tiered) * selecting, (name, budgets)
            if (policy := tiered[0].policy).prompt_rows:
                least = 4 * 2 * 600 // 16  # bytes: a number of each KV head's blocks
                assert any(part.nbytes >= least for part in policy.parts.values()), (name, parts)


@pytest.mark.slow
@pytest.mark.parametrize("shape", HYBRIDS)
def test_decode_of_a_hybrid_against_its_floor(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", shape, "--synthetic", "--context", "1100", "--ways", "ours,static"]
    assert main([*decode(*options), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert [(one["way"], one["context"]) for one in rows] == [("static", 1024), ("ours", 1100)]
    assert rows[1]["to_static"] == rows[1]["median_ms"] / rows[0]["median_ms"]
    assert rows[1]["to_ours"] == 1
    assert rows[1]["engine"]["steps"] == 2


@pytest.mark.slow
def test_a_stock_model_that_cannot_be_compiled_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such operation")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled(call, backend=refuse))
    options = ["--shape", "tiny", "--synthetic", "--context", "512", "--ways", "floor,device", "--json"]
    assert main(decode(*options)) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert rows[0]["skipped"].startswith("the stock model can't be compiled: ")
    assert "to_floor" not in rows[1]


# Policies, loops, evaluations


@pytest.mark.slow
def test_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["bench", "policies", "--device", "cpu", "--shape", "tiny", "--budget", "160", "--context", "640"]
    command += ["--steps", "2", "--out", str(out)]
    assert main([*command, "--policies", "predictor,full"]) == 0
    capsys.readouterr()
    before = out.read_text()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert out.read_text().startswith(before)
    rows = found["timings"]
    assert {row["policy"] for row in rows} == set(BUILT_IN)
    assert (rows[0]["policy"], rows[0]["ratio"]) == ("predictor", 1)
    assert all(row["median_ms"] > 0 and row["ratio"] == row["median_ms"] / rows[0]["median_ms"] for row in rows)
    reasons = {row["policy"]: row["not_captured"] for row in rows}
    assert reasons.pop("full") == "it attends to everything"
    assert all(reason.startswith("thread: ") for reason in reasons.values()), reasons
    assert main(command) == 0  # nothing left to do
    text = capsys.readouterr().out
    assert text.count(" × the first, not captured: ") == len(rows)
    assert text.count("ms in sum: ") == len(rows)


def test_how_steps_were_taken() -> None:
    stats = {"steps": 4, "captured_steps": 4, "fallbacks": {}, "prefetch": "captured steps, …"}
    assert how_taken("predictor", stats) == "captured"
    stats |= {"captured_steps": 3, "fallbacks": {"no room": 1, "no kernel": 1}}
    assert how_taken("quest", stats) == "3 of 4 captured: no room; no kernel"
    assert why_not_captured("full", stats) == "it attends to everything"


@pytest.mark.slow
def test_loops_side_by_side(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(40, 97))  # which would end both at once
    model.save_pretrained(tmp_path)
    command = ["bench", "generate", "--device", "cpu", "--budget", "160", "--context", "300", "--new-tokens", "12"]
    assert main([*command, "--model", str(tmp_path), "--repeats", "2", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["timings"]
    assert [row["name"] for row in rows] == ["engine.generate", "model.generate"]
    assert [row["engine"]["steps"] for row in rows] == [11, 11]
    assert all(len(row["all_ms"]) == 2 and row["ms"] > 0 for row in rows)
    assert rows[1]["ratio"] == rows[1]["ms"] / rows[0]["ms"]
    assert main([*command, "--shape", "tiny", "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    assert "same_tokens True" in text
    assert text.count("× engine.generate, not captured: thread") == 2


@pytest.mark.slow
def test_a_token_of_perplexity(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path)
    command = ["bench", "perplexity", "--device", "cpu", "--model", str(tmp_path), "--context", "300", "--tail", "12"]
    command += ["--budget", "160", "--repeats", "1"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert {row["name"] for row in rows} == set(BUILT_IN)
    for row in rows:
        assert all(row[figure] > 0 for figure in FIGURES)
        assert row["sample_ms"] > row["prompt_ms"] + 11 * row["token_ms"] * 0.99
        assert row["first_sample_ms"] > row["attach_ms"] >= 0
        assert ("engine" in row) == (row["name"] != "full")
    assert all(row["engine"]["steps"] == 11 for row in rows if "engine" in row)
    assert main([*command, "--policies", "streaming,full"]) == 0
    assert "the stock model" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["tiny", *HYBRIDS])
@torch.no_grad()
def test_static_steps_are_captured_on_a_gpu(shape: str) -> None:
    """Replayed ones say what a stock cache says; in bf16, in which experts are asked without the host."""
    model = random_model(shape_config(shape, 8192), torch.device("cuda"), torch.bfloat16)
    made, ids = made_up(model, 400, batch=2)
    stock, static = DynamicCache(config=model.config), plain_static_cache(model, 512)
    made.fill(stock)
    made.fill(static)
    step = StaticStep(model, static, 512, batch=2)
    for i in range(6):
        token = ids[:, i : i + 1].expand(2, 1).cuda()
        wanted, found = model(token, **with_cache(model, stock)).logits, step(token)
        assert (step.graph is not None) == (i >= 2)
        torch.testing.assert_close(found, wanted, atol=0.03 * float(wanted.abs().max()), rtol=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["tiny", *HYBRIDS])
def test_policies_and_loops_on_a_gpu(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cuda", "--shape", shape, "--budget", "256", "--json"]
    assert main(["bench", "policies", "--context", "2048", "--steps", "6", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert {row["policy"] for row in rows} == set(BUILT_IN)
    assert all(row["ratio"] > 0 and row["breakdown"]["sums_ms"]["the model's own"] > 0 for row in rows)
    assert main(["bench", "generate", "--context", "2048", "--new-tokens", "32", "--repeats", "1", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert all(row["engine"]["steps"] == 31 for row in rows)


@pytest.mark.gpu
def test_a_token_of_perplexity_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "perplexity", "--device", "cuda", "--context", "1024", "--repeats", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert {row["name"] for row in rows} == set(BUILT_IN)
    assert all(row["token_ms"] > 0 for row in rows)
