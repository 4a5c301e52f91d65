"""Prefill in chunks: the same as in one piece, what is cached read once, no matrix of queries by keys.

On a CPU the numbers and the bookkeeping; on a GPU also streams: delays change no bit, and nobody waits who need not.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import make_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from attention_predictor import OffloadConfig, attach
from attention_predictor.cli import main
from attention_predictor.csrc import ops
from attention_predictor.offload.attention import dense, fused
from attention_predictor.offload.attention.dense import Terms, attend, attend_prompt
from attention_predictor.offload.blocks.block_pool import BlockPool
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.host_store import HostStore
from attention_predictor.offload.blocks.transfer import SMALL_BYTES, host_copier, upload_stream
from attention_predictor.offload.chunk import Chunk, split
from attention_predictor.offload.hf.versions import cache_of, with_cache

CONFIG = {"predictor": "ema", "budget": 64, "sink": 16, "recent": 16}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
gpu = pytest.mark.gpu


def in_chunks(model, prompt, chunk, cache=None, mask=None):
    """Logits of all positions."""
    logits = []
    for start in range(0, prompt.shape[1], chunk):
        part = prompt[:, start : start + chunk]
        so_far = None if mask is None else mask[:, : start + part.shape[1]]
        out = model(part, **with_cache(model, cache), attention_mask=so_far)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("chunk", [16, 37, 150])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss", "ministral"])
@pytest.mark.usefixtures("exact_matmul")
def test_chunks_change_nothing(ids, monkeypatch, family, chunk, kernels, device):
    """Causal, capped logits, sinks; padded and not; by fused kernels for however few keys, and by plain operations."""
    monkeypatch.setattr(dense, "MIN_FUSED_TOKENS", 1 if kernels else 10**9)
    monkeypatch.setattr("attention_predictor.offload.chunk.CHUNK_TOKENS", 32)
    model, prompt = make_tiny_model(family).to(device), ids(300, batch=2).to(device)
    mask = (torch.arange(300) >= torch.tensor([[0], [70]])).long().to(device)
    for padding in (None, mask):
        stock = model(prompt, attention_mask=padding).logits
        with attach(model, OffloadConfig(**CONFIG, slab_blocks=2)) as engine:
            cache = engine.new_cache()
            ours = in_chunks(model, prompt, chunk, cache, padding)
            cache.check_integrity()
        wrong = (ours - stock).abs().amax(-1)
        assert (wrong if padding is None else wrong[mask.bool()]).max() < 1e-4


@torch.no_grad()
def test_chunks_of_a_model_with_layers_that_stay(tiny_model, ids):
    """A skipped layer has a stock cache: causal attention behind it begins where the cache ends."""
    model, prompt = tiny_model("llama"), ids(150)
    stock = model(prompt).logits
    with attach(model, OffloadConfig(**CONFIG, skip_layers=(0,))) as engine:
        assert (in_chunks(model, prompt, 60, engine.new_cache()) - stock).abs().max() < 1e-4


@torch.no_grad()
def test_what_is_cached_is_read_once_a_chunk(tiny_model, ids):
    with attach(tiny_model("llama"), OffloadConfig(**CONFIG)) as engine:
        in_chunks(engine.model, ids(300), 100, engine.new_cache())
        token_bytes = 2 * 2 * 8 * 4  # keys and values, heads, head size, fp32
        assert engine.stats.streamed_bytes == len(engine.tiered_layers) * (100 + 200) * token_bytes


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("extra", [{}, {"sinks_H": torch.zeros(4)}, {"softcap": 20.0}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 2000])
def test_no_matrix_of_queries_by_keys(monkeypatch, extra, padded, past):
    monkeypatch.setattr(dense, "MASK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(dense, "LOGITS_BYTES", 1 << 18)
    length, B, H, D = 4000, 2, 4, 8
    query, key, value = (torch.randn(B, heads, length, D) for heads in (H, 2, 2))
    mask = torch.arange(length) >= torch.tensor([[0], [1500]]) if padded else None
    terms, whole = Terms(0.3, mask=mask, **extra), Chunk(0, key, value)
    with Largest() as largest:
        if past:
            attend(query[:, :, past:], whole.tokens(past, length), terms, split(whole.tokens(0, past), 512))
        else:
            attend_prompt(query, key, value, terms)
    assert largest.numel <= B * H * length * 2 * D  # nothing longer than queries and keys are


class TestBench:
    @pytest.mark.slow
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("options", [[], ["--chunk", "100", "--batch", "2"]])
    def test_figures(self, capsys, device, options):
        sizes = ["--shape", "tiny", "--context", "300", "--repeats", "1"]
        assert main(["bench", "prefill", *sizes, *options, "--device", device, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {row["name"]: row for row in found["timings"]}
        stock = rows["stock cache on the device"]
        assert found["part"] == "prefill"
        assert ("stock cache, offloaded" in rows) == (device == "cuda")
        for row in rows.values():
            assert row["seconds"] > 0
            assert row["first_s"] > 0
            assert row["to_stock"] == row["seconds"] / stock["seconds"]
            assert (row["peak_bytes"] is not None) == (device == "cuda")
        assert stock["moved_bytes"] == 0
        itemsize = 2 if device == "cuda" else 4
        kv_bytes = 2 * 2 * 2 * 64 * itemsize * 300  # keys and values, layers, heads, head size
        again = 0 if not options else 1  # 100 + 200 of 300 tokens are read back
        batch = 1 + again
        assert rows["ours, without sketch and history"]["moved_bytes"] >= batch * kv_bytes * (1 + again)
        # And whole blocks of it, fetched for the next token; the last one of a chunk anew.
        assert rows["ours"]["moved_bytes"] <= batch * kv_bytes * (1 + again + (19 + 2 * again) * 16 / 300)
        if device == "cuda":
            left = 1 + 2 / 3 + 1 / 3 if again else 1  # after each chunk, all there is
            assert rows["stock cache, offloaded"]["moved_bytes"] == int(batch * kv_bytes * (left + again))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--context", "0"], "--context 0: expected at least 1"),
            (["--chunk", "0"], "--chunk 0: expected at least 1"),
            (["--repeats", "0"], "--repeats 0: expected at least 1"),
            (["--shape", "huge"], "--shape 'huge' is not known: expected one of "),
            (["--dtype", "int8"], "--dtype int8: expected one of auto, "),
            (["--context", "10000000"], "a context of 10000000 tokens: the model has positions for "),
        ],
    )
    def test_bad_input(self, capsys, options, message):
        assert main(["bench", "prefill", "--device", "cpu", *options]) == 2
        assert message in capsys.readouterr().err


# ---- on a GPU ----------------------------------------------------------------------------------------------------

SHAPE = {"batch": 2, "kv_heads": 3, "head_dim": 64, "dtype": torch.bfloat16}


def on_gpu(tokens, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, 3, tokens, 64)
    return tuple(torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(2))


def sleep(cycles):
    torch.cuda._sleep(int(cycles))


@gpu
@pytest.mark.parametrize("seed", range(4))
def test_appended_bits_survive_delays_and_reuse_of_memory(seed):
    """Keys and values are freed, and their memory written to, as soon as ``append`` has returned."""
    generator = torch.Generator().manual_seed(seed)
    side, store = (
        host_copier(torch.device("cuda", 0))._stream,
        HostStore(**SHAPE, slab_blocks=4, memory=HostMemory([torch.device("cuda")])),
    )
    expected = []
    for step in range(60):
        tokens = int((1, 1, 1, 5, 16, 64, 200, 3000)[torch.randint(8, (1,), generator=generator)])
        delay = torch.randint(3_000_000, (2,), generator=generator)
        sleep(delay[0])
        key, value = on_gpu(tokens, 100 * seed + step)
        expected.append(torch.stack([key, value]))
        with torch.cuda.stream(side):
            sleep(delay[1])
        store.append(key, value)
        del key, value
        for _ in range(2):
            torch.full((2, 3, tokens, 64), float("nan"), dtype=torch.bfloat16, device="cuda")
        if step % 20 == 7:
            store.truncate(length := store.length - 3)
            expected = [torch.cat(expected, 3)[:, :, :, :length]]
        if step % 20 == 13:
            start = int(torch.randint(store.length, (1,), generator=generator))
            found = torch.stack(store.read(start, store.length))
            assert torch.equal(found, torch.cat(expected, 3)[:, :, :, start:].cpu())
    assert torch.equal(torch.stack(store.read(0, store.length)), torch.cat(expected, 3).cpu())
    store.check_integrity()


@gpu
@pytest.mark.parametrize("tokens", [1, 2000])
def test_append_waits_for_nobody(tokens):
    store = HostStore(**SHAPE, slab_blocks=4, memory=HostMemory([torch.device("cuda")]))
    for size in (2000, tokens):  # what is allocated now is there when these are appended once more
        store.append(*on_gpu(size, 0))
    store.settle()
    store.reserve(8000)
    key, value = on_gpu(tokens, 1)
    torch.cuda.synchronize()
    sleep(2e9)  # about a second
    slept = torch.cuda.current_stream().record_event()
    store.append(key, value)
    assert not slept.query()
    assert torch.equal(store.read(store.length - tokens, store.length)[0], key.cpu())  # who reads waits


@gpu
def test_the_device_reads_what_was_appended_before():
    """The gather of another stream begins with the bits of an append that was late."""
    store = HostStore(**SHAPE, slab_blocks=4, memory=HostMemory([torch.device("cuda")]))
    if (reason := ops.why_no_kernels(torch.device("cuda", 0))) is not None:
        pytest.skip(reason)
    key, value = on_gpu(200, 0)
    pool = BlockPool(batch=2, kv_heads=3, slots=4, block_size=16, head_dim=64, dtype=torch.bfloat16, device="cuda")
    for first in (0, 100):
        sleep(2e8)
        store.append(key[:, :, first : first + 100], value[:, :, first : first + 100])
        with torch.cuda.stream(torch.cuda.Stream()):
            block_RS, slot_RS, moves_R = (
                torch.tensor([first // 16 + 1, 1, 1], dtype=torch.int32, device="cuda")[:, None, None]
                .expand(3, 6, 4)
                .contiguous()
            )
            lists = (block_RS, slot_RS, moves_R[:, 0].contiguous())
            slabs = ops.Slabs(store.addresses(key.device), store.slab_blocks)
            ops.move_blocks(slabs, *lists, pool.key_BGSTD, pool.value_BGSTD, None)
            torch.cuda.current_stream().synchronize()
        start = (first // 16 + 1) * 16
        assert torch.equal(pool.key_BGSTD[:, :, 1], key[:, :, start : start + 16])
        assert torch.equal(pool.value_BGSTD[:, :, 1], value[:, :, start : start + 16])


@gpu
@pytest.mark.parametrize("seed", range(3))
def test_streamed_bits_survive_delays(seed):
    generator = torch.Generator().manual_seed(seed)
    device, side = torch.device("cuda", 0), upload_stream(torch.device("cuda", 0))
    store = HostStore(**SHAPE, slab_blocks=4, memory=HostMemory([torch.device("cuda")]))
    kept = torch.stack(on_gpu(1000, seed))
    store.append(*kept)
    for stop in (1000, 640, 1000, 17):
        found = []
        for number, (start, key, value) in enumerate(store.stream(stop, 128, device)):
            delay = torch.randint(4_000_000, (2,), generator=generator)
            sleep(delay[0])
            found.append(torch.stack([key, value]))
            with torch.cuda.stream(side):
                sleep(delay[1])
            assert start == sum(part.shape[3] for part in found[:-1])
            if stop == 640 and number == 3:
                break  # with copies under way
        assert torch.equal(torch.cat(found, 3), kept[:, :, :, : sum(part.shape[3] for part in found)])


@gpu
@torch.no_grad()
def test_two_layers_of_keys_and_values_at_most():
    """Of one layer's they are alive while they leave; of the next while they are computed."""
    context, layers = 1 << 17, 8
    shape = {"num_hidden_layers": layers, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": context}
    model = make_tiny_model("llama", **shape).to("cuda", torch.bfloat16)
    model.set_attn_implementation("sdpa")  # of the forward without a cache: logits of 128K by 128K would not fit
    prompt = torch.randint(2, 90, (1, context), device="cuda")
    layer_bytes = 2 * 4 * 64 * 2 * context

    def peak(**options):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(prompt, logits_to_keep=1, **options)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with attach(model, OffloadConfig(**CONFIG)) as engine:
        peak(**with_cache(model, engine.new_cache()))  # libraries take their memory
        bare = peak(use_cache=False)  # with the keys and values of the layer that is computed
        ours = peak(**with_cache(model, engine.new_cache()))
        kept = engine.stats.device_kv_bytes
    for_a_moment = 2 * SMALL_BYTES + dense.LOGITS_BYTES  # a layer's sketch and rows in the making
    assert ours - (bare - layer_bytes) <= 2 * layer_bytes + kept + for_a_moment < layers * layer_bytes


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    ],
)
@pytest.mark.usefixtures("exact_matmul")
def test_log_sum_exp_of_every_backend(backend, dtype, D, heads, causal):
    """Output and log-sum-exp against fp64; query counts that some backends pad."""
    torch.manual_seed(0)
    Q = T = 333
    query, key, value = (torch.randn(2, n, Q, D, device="cuda").to(dtype) for n in (8, heads, heads))
    with sdpa_kernel(backend):
        if fused._backend(query, key, causal=causal) != backend:
            pytest.skip(f"{backend} can't do it here")
        piece = fused.attend_piece(query, key, value, D**-0.5, None, causal=causal)
    keys, values = (x.double().repeat_interleave(8 // heads, 1) for x in (key, value))
    logits = query.double() @ keys.mT * D**-0.5
    if causal:
        logits = logits.masked_fill(~torch.ones(Q, T, dtype=torch.bool, device="cuda").tril(), -torch.inf)
    assert piece.lse_BHQ.shape == (2, 8, Q)
    assert (piece.lse_BHQ - logits.logsumexp(-1)).abs().max() < (1e-4 if dtype == torch.float32 else 1e-2)
    plain = logits.to(dtype).softmax(-1) @ values.to(dtype)
    exact = logits.softmax(-1) @ values
    assert (piece.out_BHQD - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


@gpu
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss"])
def test_half_precision_in_chunks_on_a_gpu(ids, family):
    """Logits err at most twice as much as those of the stock model in the same precision."""
    prompt = ids(700).cuda()
    exact = make_tiny_model(family).cuda()(prompt).logits
    model = make_tiny_model(family).to("cuda", torch.bfloat16)
    stock = model(prompt).logits.float()
    with attach(model, OffloadConfig(**CONFIG)) as engine:
        for chunk in (700, 160):
            ours = in_chunks(model, prompt, chunk, engine.new_cache()).float()
            rms = [(x - exact).square().mean().sqrt() for x in (ours, stock)]
            assert rms[0] <= 2 * rms[1]


@gpu
@torch.no_grad()
def test_plain_operations_on_a_gpu_are_noted(ids):
    """Capped logits, without flash-attn; nothing where a kernel does it."""
    for family, noted in (("llama", False), ("gemma2", fused._installed() is None)):
        model = make_tiny_model(family).to("cuda", torch.bfloat16)
        with attach(model, OffloadConfig(**CONFIG)) as engine:
            in_chunks(model, ids(300).cuda(), 100, engine.new_cache())
            assert any("plain torch operations attend" in message for message in engine.stats.fallbacks) == noted


@gpu
@torch.no_grad()
@pytest.mark.parametrize("prefetch", ["thread", "none"])
def test_an_interrupted_prefill_leaves_what_was_there(ids, monkeypatch, prefetch):
    """The append of a chunk fails half way, with copies under way; the chunks before it are as they were."""
    model, prompt = make_tiny_model("llama", num_hidden_layers=3).to("cuda", torch.bfloat16), ids(900).cuda()
    with attach(model, OffloadConfig(**CONFIG, slab_blocks=4, prefetch=prefetch)) as engine:
        cache = engine.new_cache()
        in_chunks(model, prompt[:, :600], 300, cache)
        before = [torch.stack(layer.blocks.store.read(0, 600)).clone() for layer in cache.layers]
        real, calls = torch.stack, []

        def stack(*args, **kwargs):
            if kwargs.get("dim") == -3:
                calls.append(args)
                if len(calls) == 5:
                    raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(torch, "stack", stack)
        sleep(2e8)
        with pytest.raises(KeyboardInterrupt):
            model(prompt[:, 600:], **with_cache(model, cache))
        monkeypatch.undo()
        torch.cuda.synchronize()
        for layer, kept in zip(cache.layers, before, strict=True):
            layer.blocks.store.check_integrity()
            assert torch.equal(torch.stack(layer.blocks.store.read(0, 600)), kept)
