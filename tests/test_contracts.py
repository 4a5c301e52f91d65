"""Contract 1: with a budget of at least the context, greedy tokens and logits are the stock model's, everywhere.

One table of families × policies, and one of generation modes; all in fp32 against the eager reference.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, make_tiny_model
from transformers import PreTrainedTokenizerFast, pipeline

from attention_predictor import OffloadConfig, attach
from attention_predictor.csrc.block_code import decode_reference, encode_reference
from attention_predictor.offload.hf.versions import cache_of, with_cache
from attention_predictor.offload.policy_names import BUILT_IN

POLICIES = tuple(BUILT_IN)
CODED = (("predictor", "int8"), ("predictor", "int4"), ("quest", "int8"), ("full", "int4"))
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def config(policy: str = "predictor", **changes) -> OffloadConfig:
    return OffloadConfig(**({"policy": policy, "predictor": "ema", "budget": 1024} | changes))


def logits_of(model, inputs, **options):
    return model.generate(inputs, output_logits=True, return_dict_in_generate=True, **GREEDY, **options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_when_the_budget_covers_the_context(tiny_model, ids, family, policy):
    model, prompt = tiny_model(family), ids(150)
    stock = logits_of(model, prompt)
    with attach(model, config(policy)) as engine:
        ours = logits_of(model, prompt)
    assert torch.equal(ours.sequences, stock.sequences)
    for ours_step, stock_step in zip(ours.logits, stock.logits, strict=True):
        assert (ours_step - stock_step).abs().max() < 1e-4
    if engine.tiered_layers:
        assert engine.stats.host_kv_bytes > 0
        assert not engine.stats.fallbacks
    else:
        assert "nothing is offloaded" in str(engine.stats)


def greedy(model, prompt):
    return model.generate(prompt, **GREEDY)


def sampling(model, prompt):
    torch.manual_seed(7)
    return model.generate(prompt, do_sample=True, temperature=0.9, top_k=20, max_new_tokens=24)


def beams(model, prompt):
    return model.generate(prompt, num_beams=4, **GREEDY)


def beam_sampling(model, prompt):
    torch.manual_seed(7)
    return model.generate(prompt, num_beams=3, num_return_sequences=2, do_sample=True, max_new_tokens=16)


def several_sequences(model, prompt):
    torch.manual_seed(7)
    return model.generate(prompt, do_sample=True, num_return_sequences=3, max_new_tokens=16)


def left_padded_batch(model, prompt):
    batch = prompt.repeat(3, 1)
    mask = torch.ones_like(batch)
    for sequence, padding in enumerate((0, 5, 83)):
        batch[sequence, :padding], mask[sequence, :padding] = 0, 0
    return model.generate(batch, attention_mask=mask, **GREEDY)


def chunked_prefill(model, prompt):
    return model.generate(prompt, prefill_chunk_size=37, **GREEDY)


def next_turn(model, prompt):
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    turn = torch.cat([first.sequences, prompt[:, :21]], 1)
    return model.generate(turn, **with_cache(model, cache_of(first)), **GREEDY)


def deep_copied_prefix(model, prompt):
    cache = cache_of(model(prompt, use_cache=True))
    outputs = []
    for seed in (1, 2):
        turn = torch.cat([prompt, prompt[:, 10 * seed : 10 * seed + 9]], 1)
        outputs.append(model.generate(turn, **with_cache(model, copy.deepcopy(cache)), **GREEDY))
    return torch.cat(outputs)


def assisted(model, prompt):
    return model.generate(prompt, assistant_model=make_tiny_model("llama", seed=1), **GREEDY)


def prompt_lookup(model, prompt):
    return model.generate(prompt.repeat(1, 2), prompt_lookup_num_tokens=4, **GREEDY)


def input_embeddings(model, prompt):
    return model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **GREEDY)


def token_by_token(model, prompt):
    cache, tokens = cache_of(model(prompt[:, :-1], use_cache=True)), [prompt[:, -1:]]
    for _ in range(24):
        logits = model(tokens[-1], **with_cache(model, cache), use_cache=True).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def inference_mode(model, prompt):
    with torch.inference_mode():
        return model.generate(prompt, **GREEDY).clone()


def one_token_prompt(model, prompt):
    return model.generate(prompt[:, :1], **GREEDY)


MODES = (
    greedy,
    sampling,
    beams,
    beam_sampling,
    several_sequences,
    left_padded_batch,
    chunked_prefill,
    next_turn,
    deep_copied_prefix,
    assisted,
    prompt_lookup,
    input_embeddings,
    token_by_token,
    one_token_prompt,
    inference_mode,
)


@torch.no_grad()
@pytest.mark.parametrize(("family", "policy"), [("llama", "predictor"), ("gemma3", "quest"), ("gpt-oss", "full")])
@pytest.mark.parametrize("mode", MODES)
def test_generation_modes(tiny_model, ids, mode, family, policy):
    model, prompt = tiny_model(family), ids(150)
    stock = mode(model, prompt)
    with attach(model, config(policy)):
        ours = mode(model, prompt)
    assert torch.equal(ours, stock)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "policy"), [(mode, "predictor") for mode in MODES] + [(left_padded_batch, name) for name in POLICIES[:-1]]
)
def test_modes_run_sparse_and_the_same_threaded_or_not(tiny_model, ids, mode, policy):
    """Contract 2, with a budget far below the context: the same selection gives the same tokens."""
    model, prompt = tiny_model("llama"), ids(150)
    outputs = []
    for prefetch in ("thread", "none"):
        small = config(policy, prefetch=prefetch, budget=64, sink=16, recent=16)
        with attach(model, small) as engine:
            outputs.append(mode(model, prompt))
        assert engine.stats.steps > 0
    assert torch.equal(*outputs)


@torch.no_grad()
def test_early_exit(tiny_model, ids):
    """Drafts by the model's own first layer: that the others' cache nothing is not taken for an interrupted step."""
    model, prompt = tiny_model("llama"), ids(150)
    stock = model.generate(prompt, assistant_early_exit=1, **GREEDY)
    with attach(model, config()):
        assert torch.equal(model.generate(prompt, assistant_early_exit=1, **GREEDY), stock)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_changes_no_choice(tiny_model, ids, policy):
    """A sequence padded by whole groups of the sketch decodes sparsely as it does alone, its sink included."""
    model, prompt = tiny_model("llama"), ids(170)
    padded = torch.cat([torch.cat([torch.zeros_like(prompt[:, :64]), prompt], 1), ids(234, seed=1)])
    mask = torch.ones_like(padded)
    mask[0, :64] = 0
    settings = {"budget": 96, "sink": 32, "recent": 16, "predictor": "default", "budget_allocation": "uniform"}
    with attach(model, config(policy, **settings)):
        alone = logits_of(model, prompt)
    with attach(model, config(policy, **settings)):
        together = logits_of(model, padded, attention_mask=mask)
    for step, (one, both) in enumerate(zip(alone.logits, together.logits, strict=True)):
        assert (one[0] - both[0]).abs().max() < 1e-3, step


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefill_inference", [True, False])
def test_inference_mode_and_others_take_turns(tiny_model, ids, policy, prefill_inference):
    """State made in inference mode is written to outside of it, and the other way round."""

    def mode(inference: bool):
        return torch.inference_mode() if inference else torch.no_grad()

    model, prompt = tiny_model("llama"), ids(150)
    with attach(model, config(policy, budget=96, sink=16, recent=16)) as engine:
        cache = engine.new_cache()
        with mode(prefill_inference):
            model(prompt, **with_cache(model, cache))
        for step in range(40):
            with mode(step % 5 == 0):
                model(prompt[:, step : step + 1], **with_cache(model, cache))
            if step == 20:
                with mode(not prefill_inference):
                    cache.crop(-9)
                    cache.reorder_cache(torch.tensor([0, 0]))
                prompt = prompt.repeat(2, 1)
        cache.check_integrity()


def test_pipeline(tiny_model, ids):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w96")
    prompt = " ".join(f"w{number}" for number in ids(150)[0].tolist())
    model = tiny_model("llama")

    def run() -> str:
        generator = pipeline("text-generation", model=model, tokenizer=fast)
        return generator(prompt, **GREEDY)[0]["generated_text"]

    stock = run()
    with attach(model, config()) as engine:
        assert run() == stock
    assert engine.stats.steps > 0


@torch.no_grad()
def test_nothing_is_lost(tiny_model, ids):
    """Contract 4: host memory holds every block, bit-equal to what the model produced."""
    model, prompt = tiny_model("llama"), ids(300)
    stock = cache_of(model(prompt, use_cache=True))
    with attach(model, config(budget=64, sink=16, recent=16)) as engine:
        cache = engine.new_cache()
        model(prompt, **with_cache(model, cache))
        for layer, stock_layer in zip(cache.layers, stock.layers, strict=True):
            key, value = layer.blocks.store.read(0, 300)
            if layer.number == 0:  # above it, attention's own rounding has come in between
                assert torch.equal(key, stock_layer.keys)
                assert torch.equal(value, stock_layer.values)
            assert (key - stock_layer.keys).abs().max() < 1e-5
        cache.check_integrity()


@torch.no_grad()
@pytest.mark.parametrize("host_kv", ["int8", "int4"])
def test_nothing_is_lost_of_codes(tiny_model, ids, host_kv):
    """Contract 4, where blocks are coded: complete blocks are stored equal to their code, the rest as it is."""
    model, prompt = tiny_model("llama"), ids(300)
    stock = cache_of(model(prompt, use_cache=True)).layers[0]
    with attach(model, config(budget=64, sink=16, recent=16, host_kv=host_kv)) as engine:
        cache = engine.new_cache()
        model(prompt, **with_cache(model, cache))
        read_BGLD = cache.layers[0].blocks.store.read(0, 300)
        bits = engine.config.code_bits
    whole = [kv[:, :, : 300 // 16 * 16].unflatten(2, (-1, 16)) for kv in (stock.keys, stock.values)]
    decoded = decode_reference(encode_reference(*whole, bits), 16, stock.keys.shape[-1], bits, torch.float32)
    for side, (read, exact) in enumerate(zip(read_BGLD, (stock.keys, stock.values), strict=True)):
        assert torch.equal(read[:, :, :288], decoded[:, :, :, side].flatten(2, 3))
        assert torch.equal(read[:, :, 288:], exact[:, :, 288:])
    off = (read_BGLD[0] - stock.keys).abs().max() / stock.keys.abs().max()
    assert 0 < off < 2.0**-bits


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_coded_blocks_in_every_mode(tiny_model, ids, mode):
    """Contract 2 where blocks are coded: the same tokens with a thread, without one, and by torch operations alone.

    A budget beyond the context attends to what the codes decode to as well: which blocks are resident makes no
    difference.
    """
    model, prompt = tiny_model("llama"), ids(150)
    for budget in (64, 1024):
        outputs = []
        for changes in ({"prefetch": "thread"}, {"prefetch": "none"}, {"prefetch": "none", "kernels": "none"}):
            sizes = {"budget": budget, "sink": 16, "recent": 16, "host_kv": "int8"}
            with attach(model, config(**sizes | changes)) as engine:
                outputs.append(mode(model, prompt))
            assert engine.stats.steps > 0
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
@pytest.mark.parametrize(("policy", "host_kv"), [*((name, "auto") for name in POLICIES), *CODED])
def test_integrity_while_decoding_sparsely(tiny_model, ids, policy, host_kv):
    model, prompt = tiny_model("qwen3"), ids(200, batch=2)
    with attach(model, config(policy, budget=64, sink=16, recent=16, host_kv=host_kv)) as engine:
        cache = engine.new_cache()
        model(prompt, **with_cache(model, cache))
        token = prompt[:, -1:]
        for step in range(40):
            token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
            cache.check_integrity()
            if step == 20:
                cache.crop(-7)
                cache.reorder_cache(torch.tensor([1, 1]))
                cache.check_integrity()
        assert {layer.blocks.store.length for layer in cache.layers} == {200 + 40 - 7}
        if policy != "full":
            read = engine.stats.wanted_blocks / (engine.stats.steps * sum(2 * layer.kv_heads for layer in cache.layers))
            assert read <= 64 // 16
