"""Every kind of model, and every kind of forward: right, or stock and said so, or refused in one line."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from tiny_models import WITH_IMAGES, make_tiny_model_with_image
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from attention_predictor import AttachError, OffloadConfig, attach
from attention_predictor.offload.hf.forwards import Forwards
from attention_predictor.offload.hf.recomputed import RecomputedAsStock
from attention_predictor.offload.hf.versions import (
    CHECKPOINTS_WITHOUT_GRADIENTS,
    cache_of,
    checkpointed,
    with_cache,
)
from attention_predictor.offload.hf.warm_up import warm_up
from attention_predictor.offload.stats import Stats

WHOLE = OffloadConfig(predictor="ema")  # a budget that covers the context
SPARSE = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """Of the model and of every part that has a configuration of its own."""
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }


def random_model(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


class TestImages:
    @pytest.mark.parametrize("family", WITH_IMAGES)
    def test_exact_with_an_image(self, family: str) -> None:
        model, inputs = make_tiny_model_with_image(family)
        options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
        stock = model.generate(**inputs, **options)
        with attach(model, WHOLE) as engine:
            ours = model.generate(**inputs, **options)
        assert torch.equal(ours.sequences, stock.sequences)
        assert max(float((a - b).abs().max()) for a, b in zip(ours.logits, stock.logits, strict=True)) < 1e-4
        assert engine.stats.steps == 11
        assert engine.stats.host_kv_bytes > 0
        assert not engine.stats.fallbacks

    @pytest.mark.parametrize("family", WITH_IMAGES)
    def test_the_language_model_alone_is_changed(self, family: str) -> None:
        model, _ = make_tiny_model_with_image(family)
        before = implementations(model)
        with attach(model, WHOLE):
            during = implementations(model)
        changed = {name for name in before if during[name] != before[name]}
        assert changed == {name for name, module in model.named_modules() if module is model.get_decoder()}
        assert implementations(model) == before

    def test_two_turns_about_an_image(self) -> None:
        model, inputs = make_tiny_model_with_image("llava")

        def talk() -> torch.Tensor:
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            turn = torch.cat([first.sequences, inputs["input_ids"][:, 30:45]], 1)
            cache = with_cache(model, cache_of(first))
            return model.generate(turn, attention_mask=torch.ones_like(turn), **cache, **GREEDY)

        stock = talk()
        with attach(model, WHOLE):
            assert torch.equal(talk(), stock)


class TestShapes:
    def test_layers_of_several_head_sizes(self, ids) -> None:
        """Gemma 4: layers that attend to everything have larger heads, and other numbers of them."""
        config = transformers.Gemma4TextConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=24, pad_token_id=0,
            vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )  # fmt: skip
        model = random_model(config)
        stock = model.generate(ids(80), **GREEDY)
        with attach(model, WHOLE) as engine:
            assert torch.equal(model.generate(ids(80), **GREEDY), stock)
            tokens = engine.runtime.room.slab_tokens
            assert engine.stats.host_kv_bytes == engine.runtime.room.bytes_for(1, 91) == 2 * tokens * 2 * 2 * 16 * 4

    def test_expected_sizes_are_those_of_the_tensors(self, tiny_model, ids) -> None:
        families = ("llama", "llama-mha", "qwen3", "gemma3", "gpt-oss", "phi3")
        for family, host_kv in [*((family, "auto") for family in families), ("qwen3", "int8"), ("llama", "int4")]:
            model = tiny_model(family)
            with attach(model, replace(WHOLE, host_kv=host_kv)) as engine:
                expected = engine.runtime.room.bytes_for(2, 100)
                with torch.no_grad():
                    model(ids(100, batch=2), **with_cache(model, engine.new_cache()))
                assert engine.stats.host_kv_bytes == expected > 0

    def test_keys_and_values_of_different_sizes_are_refused(self, tiny_model, ids, monkeypatch) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine, torch.no_grad():
            layer = engine.new_cache().layers[0]
            with pytest.raises(AttachError, match=r"keys have shape \[1, 2, 3, 8\] and values \[1, 2, 3, 4\]"):
                layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4))
            with pytest.raises(AttachError, match="keys have dtype float32 and values bfloat16"):
                layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16))


class TestAttentionOfTheirOwn:
    """What a model does between its cache and its attention is seen at the first forward."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                lambda: transformers.DiffLlamaConfig(
                    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2,
                ),
                "the model changes values between its cache and attention",
            ),
            (
                lambda: transformers.DogeConfig(
                    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, keep_window_size=16,
                ),
                "the model's mask adds to the logits",
            ),
        ],
    )  # fmt: skip
    def test_refused_before_a_token_is_wrong(self, ids, config, message) -> None:
        model = random_model(config())
        stock = model.generate(ids(80), **GREEDY)
        with attach(model, WHOLE), pytest.raises(AttachError, match=message) as caught:
            model.generate(ids(80), **GREEDY)
        assert "\n" not in str(caught.value)
        assert torch.equal(model.generate(ids(80), **GREEDY), stock)

    @pytest.mark.parametrize("what", ["key_states", "value_states"])
    @pytest.mark.parametrize("change", [lambda x: x * 2, lambda x: x.flip(1), lambda x: x.mul_(2)])
    def test_any_change_of_keys_and_values(self, tiny_model, ids, monkeypatch, what, change) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine, torch.no_grad():
            cache = engine.new_cache()
            update = type(cache).update

            def changed(self, *args, **kwargs):
                key, value = update(self, *args, **kwargs)
                return (change(key), value) if what == "key_states" else (key, change(value))

            monkeypatch.setattr(type(cache), "update", changed)
            with pytest.raises(AttachError, match=r"changes (keys|values)|did not reach"):
                model(ids(80), **with_cache(model, cache))

    def test_a_mask_that_differs_between_heads(self, tiny_model, ids) -> None:
        model, mask = tiny_model(), torch.ones(1, 4, 80, 80, dtype=torch.bool).tril()
        mask[:, 2, :, :5] = False
        with attach(model, WHOLE), torch.no_grad(), pytest.raises(AttachError, match="differs between heads"):
            model(ids(80), attention_mask=mask)

    def test_biases(self, tiny_model, ids) -> None:
        model = tiny_model()
        with (
            attach(model, WHOLE),
            torch.no_grad(),
            pytest.raises(AttachError, match="adds position_bias to its logits"),
        ):
            model(ids(80), position_bias=torch.zeros(1))

    def test_cached_keys_are_not_there_to_be_read(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine, torch.no_grad():
            cache = engine.new_cache()
            assert cache.layers[0].keys is None
            model(ids(80), **with_cache(model, cache))
            with pytest.raises(AttachError, match="reads or sets the cached values itself"):
                _ = cache.layers[0].values
            with pytest.raises(AttachError, match="reads or sets the cached keys itself"):
                cache.layers[0].keys = torch.zeros(1)


class TestNothingToOffload:
    @pytest.mark.parametrize("family", ["mamba", "sliding"])
    def test_runs_as_stock_and_says_so(self, tiny_model, ids, family) -> None:
        if family == "mamba":
            sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
            model = random_model(transformers.MambaConfig(**sizes))
        else:
            model = tiny_model("mistral-sliding")
        before, stock = dict(vars(model)), model.generate(ids(80), **GREEDY)
        kinds = implementations(model)
        with attach(model, WHOLE) as engine:
            assert implementations(model) == kinds
            assert "forward" not in vars(model)
            assert torch.equal(model.generate(ids(80), **GREEDY), stock)
            assert "nothing is offloaded" in str(engine.stats)
        assert vars(model).keys() == before.keys()

    def test_a_cache_of_its_own_kind(self) -> None:
        config = transformers.MiniMaxConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        )  # fmt: skip
        with pytest.raises(AttachError, match="keeps a cache of its own kind"):
            attach(random_model(config), WHOLE)


class TestGradients:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "qwen3"])
    @pytest.mark.parametrize("cache", ["none", "stock", "tiered", "unused"])
    @pytest.mark.parametrize("training", [True, False])
    def test_whole_in_training_and_evaluation(self, tiny_model, ids, family, cache, training) -> None:
        model, prompt = tiny_model(family), ids(60)
        model.train(training)

        def gradients(**given) -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(prompt, labels=prompt, **given).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        stock = gradients()
        assert any("k_proj" in name for name in stock)
        with attach(model, WHOLE) as engine:
            given = {
                "none": {},
                "stock": with_cache(model, DynamicCache(config=model.config)),
                "tiered": with_cache(model, engine.new_cache()),
                "unused": {"use_cache": False},
            }[cache]
            ours = gradients(**given)
        assert ours.keys() == stock.keys()
        for name, gradient in stock.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)

    def test_without_a_cache_given_none_is_tiered_and_it_is_said(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine:
            cache = cache_of(model(ids(60)))
            assert type(cache) is DynamicCache
            (message,) = engine.stats.fallbacks
            assert "gradients are recorded" in message
            assert "torch.no_grad()" in message
            with torch.no_grad():
                assert type(cache_of(model(ids(60)))) is not DynamicCache
            model.requires_grad_(False)
            assert type(cache_of(model(ids(60)))) is not DynamicCache

    def test_through_embeddings_of_the_caller(self, tiny_model, ids) -> None:
        model = tiny_model().requires_grad_(False)
        embeds = model.get_input_embeddings()(ids(40)).requires_grad_()
        (stock,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds)
        with attach(model, WHOLE):
            (ours,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds)
        assert torch.equal(ours, stock)

    def test_into_tokens_of_host_memory_they_are_refused(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine:
            cache = engine.new_cache()
            with torch.no_grad():
                model(ids(60), **with_cache(model, cache))
            with pytest.raises(AttachError, match="gradients are recorded, but the cached tokens are in host memory"):
                model(ids(1), **with_cache(model, cache))
            assert cache.get_seq_length() == 60
            with torch.no_grad():
                model(ids(1), **with_cache(model, cache))

    @pytest.mark.parametrize("cache", ["none", "stock", "tiered"])
    @pytest.mark.parametrize(
        ("family", "changes", "reentrant"),
        [
            ("llama", {"attention_dropout": 0.1}, True),
            ("llama", {"attention_dropout": 0.1}, False),
            ("gemma2", {}, False),
            ("gpt-oss", {}, False),
            ("qwen3", {}, True),
        ],
    )
    def test_layers_that_backward_computes_again(self, tiny_model, ids, family, changes, reentrant, cache) -> None:
        """Gradient checkpointing: as stock, when the forward is long over."""
        model, prompt = tiny_model(family, **changes).train(), ids(50)
        # The method for it is renamed between versions; this is what it does.
        model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=reentrant))
        model.enable_input_require_grads()
        functions = [one._gradient_checkpointing_func for one in checkpointed(model)]
        assert functions

        def gradients(**given) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            model.zero_grad()
            model(prompt, labels=prompt, **given).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        stock = gradients()
        with attach(model, WHOLE) as engine:
            given = {
                "none": {},
                "stock": with_cache(model, DynamicCache(config=model.config)),
                "tiered": with_cache(model, engine.new_cache()),
            }[cache]
            ours = gradients(**given)
            assert any("gradient checkpointing keeps caches" in message for message in engine.stats.fallbacks)
            copied = copy.deepcopy(model)
            assert not any(
                isinstance(one._gradient_checkpointing_func, RecomputedAsStock) for one in checkpointed(copied)
            )
            full = engine.new_cache()
            with torch.no_grad():
                model.eval()(prompt, **with_cache(model, full))
            model.train()
            with pytest.raises(AttachError, match="gradients are recorded, but the cached tokens are in host memory"):
                model(ids(1), **with_cache(model, full))
            loss = model(prompt, labels=prompt).loss
        loss.backward()  # the engine is detached meanwhile
        assert ours.keys() == stock.keys()
        assert all(torch.equal(ours[name], gradient) for name, gradient in stock.items())
        assert [one._gradient_checkpointing_func for one in checkpointed(model)] == functions

    def test_frozen_layers_under_checkpointing(self, tiny_model, ids) -> None:
        """They get no cache, whatever requires gradients."""
        model, prompt = tiny_model().requires_grad_(False).train(), ids(50)
        model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
        stock = model(prompt, labels=prompt).loss
        with attach(model, WHOLE) as engine:
            for given in ({}, with_cache(model, DynamicCache(config=model.config))):
                assert torch.equal(model(prompt, labels=prompt, **given).loss, stock)
            assert engine.stats.steps == 0
            model.generate(prompt, **GREEDY)  # without gradients
            assert (engine.stats.steps > 0) is not CHECKPOINTS_WITHOUT_GRADIENTS

    def test_of_what_a_hook_adds(self, tiny_model, ids) -> None:
        """Neither the parameters nor the inputs say that gradients are recorded."""
        model, prompt = tiny_model().requires_grad_(False), ids(50)
        added = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
        hook = model.get_input_embeddings().register_forward_hook(lambda module, given, out: out + added)
        (stock,) = torch.autograd.grad(model(prompt).logits.square().sum(), added)
        with attach(model, WHOLE):
            first = model(prompt)
            (ours,) = torch.autograd.grad(first.logits.square().sum(), added)
            torch.testing.assert_close(ours, stock, atol=1e-3, rtol=1e-4)
            with pytest.raises(AttachError, match="gradients are recorded, but the cached tokens are in host memory"):
                model(ids(1), **with_cache(model, cache_of(first)))
            first = model(prompt)
            hook.remove()
            with pytest.raises(AttachError, match="gradients are recorded, but the cached tokens are in host memory"):
                model(ids(1), **with_cache(model, cache_of(first)))
            with torch.no_grad():
                model(ids(1), **with_cache(model, cache_of(model(prompt))))

    def test_attention_dropout(self, tiny_model, ids) -> None:
        model = tiny_model(attention_dropout=0.5).train()

        def loss() -> torch.Tensor:
            torch.manual_seed(3)
            return model(ids(60), labels=ids(60)).loss

        stock = loss()
        with attach(model, WHOLE) as engine:
            assert torch.equal(loss(), stock)  # kept, where gradients are recorded
            with torch.no_grad():
                model(ids(60))
            assert any("attention dropout of 0.5 is left out" in message for message in engine.stats.fallbacks)


class TestAutocast:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3"])
    def test_as_the_stock_model(self, tiny_model, ids, family) -> None:
        model = tiny_model(family)

        def logits() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
                return torch.stack(model.generate(ids(80), **options).logits)

        model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
        stock = logits()
        with attach(model, WHOLE) as engine:
            ours = logits()
            assert engine.stats.steps == 11
            assert engine.stats.full_kv_bytes  # in half precision, as attention takes them
        exact = model.generate(ids(80), **GREEDY, output_logits=True, return_dict_in_generate=True).logits
        own_error = (stock[0] - exact[0]).abs().max()
        assert (ours[0] - stock[0]).abs().max() <= 2 * own_error

    def test_one_precision_for_a_sequence(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine, torch.no_grad():
            cache = engine.new_cache()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(ids(60), **with_cache(model, cache))
            with pytest.raises(AttachError, match="the cache started with dtype bfloat16 but now got float32"):
                model(ids(1), **with_cache(model, cache))


class TestOfTheModelAsAWhole:
    @pytest.mark.parametrize("prefetch", ["auto", "graph", "none"])
    def test_a_copy_is_a_stock_model(self, tiny_model, ids, prefetch) -> None:
        model = tiny_model()
        with attach(model, OffloadConfig(predictor="ema", prefetch=prefetch)) as engine:
            attributes = set(vars(model))
            twin = copy.deepcopy(model)
            assert set(vars(model)) == attributes
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.mul_(0.5)
            wanted = model.generate(ids(80), **GREEDY)
            steps = engine.stats.steps
            theirs = twin.generate(ids(80), **GREEDY)
            assert engine.stats.steps == steps
            assert twin.config._attn_implementation == "eager"
            assert not [name for name in vars(twin) if name in ("forward", "__deepcopy__", "__reduce_ex__")]
            with attach(twin, WHOLE):
                assert torch.equal(twin.generate(ids(80), **GREEDY), theirs)
        assert torch.equal(model.generate(ids(80), **GREEDY), wanted)
        assert not torch.equal(theirs, wanted)

    def test_a_copy_within_something_else(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE):
            twin = copy.deepcopy({"models": [model, model]})
        assert twin["models"][0] is twin["models"][1]
        assert torch.equal(twin["models"][0].generate(ids(40), **GREEDY), model.generate(ids(40), **GREEDY))

    def test_pickling_is_one_line(self, tiny_model) -> None:
        model = tiny_model()
        with attach(model, WHOLE):
            for save in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
                with pytest.raises(AttachError, match="can't be pickled: detach it first") as caught:
                    save(model)
                assert "\n" not in str(caught.value)
        torch.save(model, io.BytesIO())

    def test_save_pretrained_saves_the_stock_model(self, tiny_model, ids, tmp_path) -> None:
        model = tiny_model()
        with attach(model, WHOLE):
            model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config._attn_implementation != "attention_predictor"
        assert torch.equal(again(ids(20)).logits.argmax(-1), model(ids(20)).logits.argmax(-1))

    def test_another_attention_implementation_is_refused_meanwhile(self, tiny_model) -> None:
        model = tiny_model()
        with attach(model, WHOLE), pytest.raises(AttachError, match="detach it first"):
            model.set_attn_implementation("sdpa")
        model.set_attn_implementation("sdpa")

    def test_continuous_batching_is_refused(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE), pytest.raises(AttachError, match="no place in continuous batching") as caught:
            model.generate_batch([ids(20)[0].tolist()])
        assert "\n" not in str(caught.value)

    def test_weights_that_are_nowhere(self, tiny_model) -> None:
        model = tiny_model()
        model.lm_head.to("meta")
        with pytest.raises(AttachError, match="weights on no device"):
            attach(model, WHOLE)

    def test_peft(self, tiny_model, ids) -> None:
        """What wraps a model and gives it away by ``get_base_model`` is attached by it, however it calls it."""

        class Wrapper(torch.nn.Module):
            def __init__(self, model: PreTrainedModel) -> None:
                super().__init__()
                self.inner = model

            def get_base_model(self) -> PreTrainedModel:
                return self.inner

            def forward(self, *args, **kwargs):
                return self.inner.forward(*args, **kwargs)  # not by a call: hooks of the model would not see it

        model = tiny_model()
        wrapped = Wrapper(model)
        with attach(wrapped, WHOLE) as engine, torch.no_grad():
            cache = cache_of(wrapped(ids(60)))
            wrapped(ids(1), **with_cache(model, cache))
            assert engine.stats.steps == 1

    def test_compiled_models(self, tiny_model, ids) -> None:
        """Compiled before or after, and attached by the wrapper or by the model."""
        model = tiny_model()
        stock = model.generate(ids(80), **GREEDY)
        before = torch.compile(model, backend="eager")
        for target in (model, before):
            with attach(target, WHOLE) as engine:
                after = torch.compile(model, backend="eager")
                for compiled in (before, after):
                    steps = engine.stats.steps
                    assert torch.equal(compiled.generate(ids(80), **GREEDY), stock)
                    assert engine.stats.steps == steps + 11

    def test_the_base_model_is_offloaded_too(self, tiny_model, ids) -> None:
        model = tiny_model()
        with torch.no_grad():
            stock = model.model(ids(60)).last_hidden_state
            with attach(model, WHOLE) as engine:
                output = model.model(ids(60))
                assert cache_of(output).get_seq_length() == 60
                assert engine.stats.host_kv_bytes > 0
                torch.testing.assert_close(output.last_hidden_state, stock, atol=1e-5, rtol=1e-4)

    def test_attention_weights_are_refused_where_they_would_be_none(self, tiny_model, ids) -> None:
        model = tiny_model()
        with attach(model, WHOLE), torch.no_grad(), pytest.raises(AttachError, match="output_attentions"):
            model(ids(20), output_attentions=True)

    def test_attaching_that_fails_leaves_nothing(self, ids) -> None:
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        model = random_model(transformers.GPT2Config(**sizes))
        before, stock = dict(vars(model)), model.generate(ids(40), **GREEDY)
        with attach(model, WHOLE):
            assert torch.equal(model.generate(ids(40), **GREEDY), stock)

        def fail(self) -> None:
            raise ZeroDivisionError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Forwards, "install", fail)
            with pytest.raises(ZeroDivisionError):
                attach(model, WHOLE)
        assert vars(model).keys() == before.keys()
        assert torch.equal(model.generate(ids(40), **GREEDY), stock)

    def test_compiling_gpt2(self, ids) -> None:
        sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        model = random_model(transformers.GPT2Config(**sizes))
        stock = model.generate(ids(40), **GREEDY)
        with attach(model, OffloadConfig(predictor="ema", compile=True)):
            assert torch.equal(model.generate(ids(40), **GREEDY), stock)

    def test_detaching_that_fails_leaves_the_stock_model(self, tiny_model, ids, monkeypatch) -> None:
        model = tiny_model()
        before, stock = dict(vars(model)), model.generate(ids(40), **GREEDY)
        engine = attach(model, OffloadConfig(predictor="ema", prefetch="graph"))
        monkeypatch.setattr(engine.captured, "leave", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.detach()
        assert vars(model).keys() == before.keys()
        assert torch.equal(model.generate(ids(40), **GREEDY), stock)
        engine.detach()


class TestTheGuard:
    """Whatever a version of transformers does: what is not offloaded is an error."""

    def test_a_model_that_makes_a_cache_of_its_own(self, tiny_model, ids, monkeypatch) -> None:
        """As when the argument is called otherwise: the cache that it is given is swallowed."""
        model = tiny_model()
        forward = type(model.model).forward
        cache_name = next(iter(with_cache(model, DynamicCache())))

        def swallow(self, *args, **kwargs):
            kwargs[cache_name] = None
            return forward(self, *args, **kwargs)

        swallow.__signature__ = __import__("inspect").signature(forward)
        monkeypatch.setattr(type(model.model), "forward", swallow)
        with (
            attach(model, WHOLE),
            pytest.raises(AttachError, match="bypasses the cache: layer 0 has stored 0 of") as e,
        ):
            model.generate(ids(80), **GREEDY)
        assert "\n" not in str(e.value)

    def test_a_name_that_is_not_known(self, tiny_model, ids) -> None:
        class Renamed(transformers.LlamaForCausalLM):
            def forward(self, input_ids=None, attention_mask=None, kv_store=None):
                return super().forward(input_ids, attention_mask)

        model = Renamed(tiny_model().config).eval()
        with pytest.raises(AttachError, match="has no known cache argument"):
            attach(model, WHOLE)

    def test_a_layer_that_is_left_out(self, tiny_model, ids, monkeypatch) -> None:
        model = tiny_model()
        layer = model.model.layers[1]
        monkeypatch.setattr(layer, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
        with attach(model, WHOLE), torch.no_grad(), pytest.raises(AttachError, match="layer 1 has stored 0 of"):
            model(ids(30))

    def test_the_old_name_still_works(self, tiny_model, ids, recwarn) -> None:
        model = tiny_model()
        with attach(model, WHOLE) as engine, torch.no_grad():
            cache = engine.new_cache()
            model(ids(60), past_key_values=cache)
            assert cache.get_seq_length() == 60
        assert not [one for one in recwarn if "past_key_values" in str(one.message)]


class TestMasksThatChange:
    @pytest.mark.parametrize("prefetch", ["auto", "none"])
    @pytest.mark.parametrize("masked", ["hole", "more padding", "nothing"])
    def test_as_the_stock_model(self, tiny_model, ids, prefetch, masked) -> None:
        model, prompt = tiny_model(), ids(80, batch=2)
        mask = torch.ones(2, 100, dtype=torch.int64)
        if masked != "nothing":
            mask[1, :20] = 0
        later = mask.clone()
        if masked == "hole":
            later[0, 30:50] = 0
        elif masked == "more padding":
            later[1, :40] = 0

        def logits(cache) -> torch.Tensor:
            given = with_cache(model, cache)
            found = [model(prompt, attention_mask=mask[:, :80], **given).logits[:, -1]]
            for step in range(12):
                seen = (mask if step < 4 else later)[:, : 81 + step]
                position = torch.full((2, 1), 80 + step)
                token = prompt[:, step : step + 1]
                found.append(model(token, attention_mask=seen, position_ids=position, **given).logits[:, -1])
            return torch.stack(found)

        with torch.no_grad():
            stock = logits(DynamicCache(config=model.config))
            with attach(model, OffloadConfig(predictor="ema", prefetch=prefetch)) as engine:
                ours = logits(engine.new_cache())
        assert (ours - stock).abs().max() < 1e-4


def test_warming_up_leaves_nothing_behind(tiny_model, ids) -> None:
    """What a GPU is made to load at attach is no step, no fetch, and holds no memory."""
    for family in ("llama", "gemma3", "gpt-oss", "phi3"):
        model = tiny_model(family)
        with attach(model, SPARSE) as engine:
            before = engine.stats.to_dict()
            warm_up(engine.runtime, engine.runtime.stages[0], torch.float32)
            assert engine.stats.to_dict() == before == Stats(prefetch=engine.stats.prefetch).to_dict()
            assert engine.runtime.memory.lent_bytes == 0
            assert model.generate(ids(80), **GREEDY).shape == (1, 92)
