"""Attaching and detaching: what is refused, in one line, and that the model is left as it was."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from attention_predictor import (
    AttachError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    HostMemoryError,
    OffloadConfig,
    TieredCache,
    attach,
)
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import cache_of, with_cache
from attention_predictor.offload.policies import Policy, policy_class, policy_names, register

CONFIG = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16)


def state(model):
    """Everything that attaching could change."""
    return (
        model.config._attn_implementation,
        dict(model._forward_pre_hooks),
        set(model.__dict__),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def same_state(before, after):
    return before[:3] == after[:3] and all(torch.equal(before[3][name], after[3][name]) for name in before[3])


class TestDetach:
    def test_restores_the_model(self, tiny_model, ids):
        model = tiny_model()
        before, stock = state(model), model(ids(40)).logits
        with attach(model, CONFIG) as engine:
            assert model.config._attn_implementation == "attention_predictor"
            model.generate(ids(80), max_new_tokens=4)
        assert same_state(before, state(model))
        assert torch.equal(model(ids(40)).logits, stock)
        engine.detach()  # a second time does nothing
        assert same_state(before, state(model))

    def test_restores_the_model_after_an_exception(self, tiny_model, ids):
        model = tiny_model()
        before = state(model)
        with pytest.raises(ZeroDivisionError), attach(model, CONFIG):
            model.generate(ids(80), max_new_tokens=4)
            raise ZeroDivisionError
        assert same_state(before, state(model))

    def test_ends_the_engine(self, tiny_model, ids):
        model = tiny_model()
        engine = attach(model, CONFIG)
        cache = engine.new_cache()
        model(ids(80), **with_cache(model, cache))
        engine.detach()
        with pytest.raises(AttachError, match="detached"):
            engine.new_cache()
        with pytest.raises(AttachError, match="detached"), engine:
            pass
        with pytest.raises(AttachError, match="detached"):
            model(ids(1), **with_cache(model, cache))

    def test_within_a_stock_forward(self, tiny_model, ids):
        model = tiny_model()
        before = state(model)
        engine = attach(model, CONFIG)
        hook = model.model.layers[0].register_forward_hook(lambda *_: engine.detach())
        model(ids(20), use_cache=False)
        hook.remove()
        assert same_state(before, state(model))

    def test_the_model_can_be_attached_again(self, tiny_model, ids):
        model = tiny_model()
        outputs = []
        for _ in range(2):
            with attach(model, CONFIG):
                outputs.append(model.generate(ids(80), max_new_tokens=6, do_sample=False))
        assert torch.equal(*outputs)


class TestOtherThreads:
    """What else is done with an attached model does not disturb a generation in progress."""

    @pytest.mark.parametrize(
        "other",
        [
            lambda model, prompt: model(prompt, use_cache=False),
            lambda model, prompt: model(prompt, labels=prompt).loss.backward(),
            lambda model, prompt: copy.deepcopy(model),
            lambda model, prompt: model.generate(prompt, max_new_tokens=3, do_sample=False),
        ],
        ids=["stock", "training", "copying", "generating"],
    )
    def test_beside_a_generation(self, tiny_model, ids, other):
        model, prompt, over, errors = tiny_model(), ids(60), threading.Event(), []
        stock = model.generate(prompt, max_new_tokens=10, do_sample=False)

        def beside():
            try:
                while not over.is_set():
                    other(model, prompt)
            except Exception as error:
                errors.append(error)

        with attach(model, OffloadConfig(predictor="ema")) as engine:
            thread = threading.Thread(target=beside)
            thread.start()
            found = [model.generate(prompt, max_new_tokens=10, do_sample=False) for _ in range(8)]
            over.set()
            thread.join()
            assert engine.stats.steps >= 8 * 9
        assert not errors
        assert all(torch.equal(one, stock) for one in found)


class TestCopies:
    @pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model], ids=["model", "base model"])
    def test_are_stock_models(self, tiny_model, ids, part):
        model = tiny_model()
        stock, untouched = part(model)(ids(60))[0], copy.deepcopy(part(model))
        with attach(model, CONFIG):
            copied = copy.deepcopy({"a": [part(model)]})["a"][0]
            assert copied.config._attn_implementation == untouched.config._attn_implementation
            assert torch.equal(copied(ids(60))[0], stock)
            assert model.config._attn_implementation == "attention_predictor"
        assert vars(copied).keys() == vars(untouched).keys()
        assert all(
            vars(one).keys() == vars(other).keys()
            for one, other in zip(copied.modules(), untouched.modules(), strict=True)
        )

    def test_of_a_model_that_has_nothing_to_offload(self, tiny_model, ids):
        model = tiny_model("mistral-sliding")
        stock = model(ids(40)).logits
        with attach(model, CONFIG):
            copied = copy.deepcopy(model)
            assert torch.equal(copied(ids(40)).logits, stock)
        assert vars(copied).keys() == vars(model).keys()

    def test_keep_tied_weights(self, tiny_model):
        model = tiny_model(tie_word_embeddings=True)
        with attach(model, CONFIG):
            copied = copy.deepcopy(model)
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        assert copied.lm_head.weight is not model.lm_head.weight


class TestSharedConfigurations:
    def test_a_second_model_is_refused(self, tiny_model):
        model = tiny_model()
        twin, before = type(model)(model.config), state(model)
        with attach(model, CONFIG):
            for config in (model.config, copy.deepcopy(model.config)):
                with pytest.raises(AttachError, match="shares the configuration object of an attached"):
                    attach(type(model)(config), CONFIG)
        assert same_state(before, state(model))
        with attach(twin, CONFIG):
            pass

    def test_dropout_is_not_left_out_of_another_model(self, tiny_model, ids):
        model = tiny_model(attention_dropout=0.5)
        twin = type(model)(model.config).train()
        with attach(model, CONFIG), pytest.raises(AttachError, match="LlamaAttention would leave out dropout"):
            twin(ids(20), use_cache=False)


class TestRefusals:
    def test_second_attach(self, tiny_model):
        model = tiny_model()
        with attach(model, CONFIG):
            before = state(model)
            with pytest.raises(AttachError, match="already attached"):
                attach(model, CONFIG)
            assert same_state(before, state(model))

    def test_latent_attention(self):
        config = transformers.DeepseekV3Config(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=1,
            topk_group=1, first_k_dense_replace=1,
        )  # fmt: skip
        model = transformers.DeepseekV3ForCausalLM(config)
        before = state(model)
        with pytest.raises(AttachError, match="latent attention"):
            attach(model, CONFIG)
        assert same_state(before, state(model))

    def test_model_that_ignores_the_attention_interface(self):
        config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
        model = transformers.BloomForCausalLM(config)
        before = state(model)
        with pytest.raises(AttachError, match="ignores the attention interface"):
            attach(model, CONFIG)
        assert same_state(before, state(model))

    def test_not_a_causal_language_model(self):
        config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2)
        with pytest.raises(AttachError, match="not a causal"):
            attach(transformers.T5ForConditionalGeneration(config), CONFIG)
        with pytest.raises(AttachError, match="PreTrainedModel"):
            attach(torch.nn.Linear(2, 2), CONFIG)

    @pytest.mark.parametrize("skipped", [(5,), (0, 1)])
    def test_layers_to_skip(self, tiny_model, skipped):
        with pytest.raises(ConfigError, match="skip_layers"):
            attach(tiny_model(), OffloadConfig(predictor="ema", skip_layers=skipped))

    @pytest.mark.parametrize("name", ["nowhere", "default/../nothing"])
    def test_missing_predictor(self, tiny_model, name):
        model = tiny_model()
        before = state(model)
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            attach(model, OffloadConfig(predictor=name))
        assert same_state(before, state(model))

    def test_foreign_caches(self, tiny_model, ids):
        model = tiny_model()
        filled = cache_of(model(ids(20), use_cache=True))
        caches = {
            "another kind of cache": filled,
            "StaticCache": StaticCache(config=model.config, max_cache_len=64),
            "offloading=True": _offloaded(model),
        }
        with attach(model, CONFIG):
            for message, cache in caches.items():
                with pytest.raises(AttachError, match=message):
                    model(ids(20), **with_cache(model, cache))
            with pytest.raises(AttachError, match="StaticCache"):
                model.generate(ids(20), cache_implementation="static", max_new_tokens=2)

    def test_cache_of_another_engine(self, tiny_model, ids):
        one, two = tiny_model(), tiny_model(seed=1)
        with attach(one, CONFIG) as engine, attach(two, CONFIG), pytest.raises(AttachError, match="another engine"):
            two(ids(20), **with_cache(two, engine.new_cache()))
        with attach(one, CONFIG), pytest.raises(AttachError, match="another engine"):
            one(ids(20), **with_cache(one, TieredCache(engine.runtime)))  # of the engine that was detached

    @torch.no_grad()
    def test_context_beyond_the_positions(self, tiny_model, ids):
        model = tiny_model(max_position_embeddings=64)
        before = state(model)
        with attach(model, CONFIG) as engine:
            for call in (model, lambda prompt: model.generate(prompt, max_new_tokens=1)):
                with pytest.raises(ContextLengthError, match="65 tokens: the model has positions for 64"):
                    call(ids(65))
            with pytest.raises(ContextLengthError):
                engine.check_fits(batch=1, tokens=65)
            with pytest.raises(ContextLengthError):
                engine.generate(ids(60), max_new_tokens=6)
            assert engine.generate(ids(60), max_new_tokens=5, eos_token_id=[]).shape == (1, 65)
        assert same_state(before, state(model))

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
    def test_positions_that_run_out_in_mid_generation(self, tiny_model, ids, options):
        """As the stock model, which goes on; what was generated is not lost."""
        model, prompt = tiny_model(max_position_embeddings=64), ids(30).repeat(1, 2)
        stock = model.generate(prompt, do_sample=False, max_new_tokens=20, **options)
        with attach(model, OffloadConfig(predictor="ema")) as engine:
            assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=20, **options), stock)
        assert any("longer than the model's 64 positions" in message for message in engine.stats.fallbacks)

    def test_host_memory_is_estimated_before_the_prefill(self, tiny_model, ids, monkeypatch):
        model = tiny_model()
        before = state(model)
        with attach(model, OffloadConfig(predictor="ema", host_memory=1 << 19)) as engine:
            model(ids(200), **with_cache(model, engine.new_cache()))
            monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
            with pytest.raises(HostMemoryError, match=r"1 × 4000 tokens needs .* host_memory allows"):
                model(ids(4000), **with_cache(model, engine.new_cache()))
        with attach(model, CONFIG) as engine, pytest.raises(HostMemoryError, match="the system has available"):
            engine.check_fits(batch=10**9, tokens=4000)
        assert same_state(before, state(model))

    def test_host_memory_holds_while_decoding(self, tiny_model, ids):
        model = tiny_model()
        before = state(model)
        limit = 2 * 2 * 2 * 8 * 4 * 96  # keys and values of two layers and heads, fp32: 96 tokens
        config = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, slab_blocks=1, host_memory=limit)
        with attach(model, config) as engine:
            cache = engine.new_cache()
            with pytest.raises(HostMemoryError, match=r"1 × 97 tokens needs .* host_memory allows"):
                model.generate(ids(80), **with_cache(model, cache), max_new_tokens=40)
            assert cache.get_seq_length() == 96
            assert engine.stats.host_kv_bytes == limit
            cache.check_integrity()
        assert same_state(before, state(model))

    @torch.no_grad()
    def test_host_memory_holds_for_all_caches_together(self, tiny_model, ids):
        model = tiny_model()
        slab = 2 * 2 * 2 * 8 * 4 * 16  # keys and values of two layers and heads, fp32: 16 tokens
        limit = 9 * slab
        config = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, slab_blocks=1, host_memory=limit)
        with attach(model, config) as engine:

            def filled(tokens: int):
                cache = engine.new_cache()
                model(ids(tokens), **with_cache(model, cache))
                return cache

            one, two = filled(80), filled(60)  # the last slab of which is not complete: a copy does not share it
            assert engine.stats.host_kv_bytes == limit
            with pytest.raises(HostMemoryError, match=r"1 × 1 tokens needs .* host_memory allows 0 bytes"):
                filled(1)
            with pytest.raises(HostMemoryError, match=r"host_memory allows 36\.00 KiB, and this engine's caches hold"):
                copy.deepcopy(two)
            with pytest.raises(HostMemoryError, match="1 × 81 tokens needs"):
                model(ids(1), **with_cache(model, one))
            assert engine.runtime.memory.lent_bytes == limit  # what failed has returned what it took
            del two
            assert engine.runtime.memory.lent_bytes == 5 * slab
            model(ids(1), **with_cache(model, one))
            assert engine.stats.host_kv_bytes == 6 * slab
            one.check_integrity()

    @torch.no_grad()
    def test_host_memory_holds_before_the_first_tensors_show_their_shape(self, tiny_model, ids):
        model = tiny_model()
        config = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, slab_blocks=1, host_memory=2**14)
        with attach(model, config) as engine:
            engine.runtime.room.shapes.update(dict.fromkeys(engine.runtime.room.shapes))
            with pytest.raises(
                HostMemoryError, match=r"more of host memory for KV blocks: host_memory allows 16.00 KiB"
            ):
                model(ids(200), **with_cache(model, engine.new_cache()))


def _offloaded(model):
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # as the constructor sets it, which on a CPU-only machine can't make its stream
    return cache


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"policy": "best"}, "policy='best' .* full, streaming, quest, quest-ahead, predictor, oracle"),
            ({"budget": 143}, r"budget=143 .* at least sink \+ recent \+ one block = 64 \+ 64 \+ 16 = 144"),
            ({"budget": 1.5}, "budget=1.5 .* an integer"),
            ({"block_size": 12}, "block_size=12 .* a power of two"),
            ({"block_size": 0}, "block_size=0 .* a power of two"),
            ({"sink": 10}, "sink=10 .* multiple of block_size=16"),
            ({"recent": -16}, "recent=-16"),
            ({"late_fetch": -0.1}, r"late_fetch=-0.1 .* a share from 0 to 1"),
            ({"late_fetch": float("nan")}, "late_fetch=nan"),
            ({"reserve": -0.5}, r"reserve=-0.5 .* a share from 0 on"),
            ({"reserve": float("inf")}, "reserve=inf"),
            ({"reserve_ahead": 1.5}, r"reserve_ahead=1.5 .* a share from 0 to 1"),
            ({"calibration": "often"}, "calibration='often' .* sketch, exact, none"),
            ({"calibration_interval": 0}, "calibration_interval=0"),
            ({"sketch_bits": 3}, "sketch_bits=3 .* 1, 2, 4, 8"),
            ({"prefetch": "magic"}, "prefetch='magic' .* thread, graph, none"),
            ({"skip_layers": (-1,)}, r"skip_layers=\(-1,\) .* layer numbers from 0 on"),
            ({"skip_layers": 5}, "skip_layers=5 .* layer numbers from 0 on"),
            ({"skip_layers": "all"}, "skip_layers='all' .* layer numbers from 0 on"),
            ({"host_memory": 0}, "host_memory=0"),
            ({"measure_recovery": -1}, "measure_recovery=-1"),
            ({"predictor": ""}, "predictor=''"),
        ],
    )
    def test_bad_values_are_named(self, changes, message):
        with pytest.raises(ConfigError, match=message) as caught:
            OffloadConfig(**changes)
        assert "\n" not in str(caught.value)

    def test_attach_takes_settings_of_this_class(self, tiny_model):
        with pytest.raises(ConfigError, match="attach takes an OffloadConfig, got dict"):
            attach(tiny_model(), {"budget": 512})

    def test_fields_are_keyword_only_and_frozen(self):
        with pytest.raises(TypeError):
            OffloadConfig(512)
        with pytest.raises(AttributeError):
            OffloadConfig().budget = 3


class TestRegistry:
    def test_unknown_name_lists_the_valid(self):
        with pytest.raises(ConfigError, match=", ".join(policy_names())):
            policy_class("nothing")

    def test_a_name_is_given_once(self):
        class Impostor(Policy):
            name = "full"
            selects = "all"

        with pytest.raises(ConfigError, match="already used by Full"):
            register(Impostor)


class TestCaches:
    def test_an_empty_dynamic_cache_is_adopted_in_place(self, tiny_model, ids):
        model = tiny_model()
        with attach(model, CONFIG):
            cache = DynamicCache()
            model(ids(80), **with_cache(model, cache))
            assert cache.get_seq_length() == 80
            assert all(isinstance(layer, TieredLayer) for layer in cache.layers)
            assert isinstance(cache, TieredCache)
            cache.check_integrity()

    def test_no_cache_where_none_is_wanted(self, tiny_model, ids):
        model = tiny_model()
        stock = model(ids(80), use_cache=False).logits
        with attach(model, CONFIG) as engine:
            out = model(ids(80), use_cache=False)
            assert cache_of(out) is None
            assert not engine.stats.host_bytes
            assert (out.logits - stock).abs().max() < 1e-4

    def test_skipped_layers_keep_stock_caches(self, tiny_model, ids):
        model = tiny_model()
        with attach(model, OffloadConfig(predictor="ema", skip_layers=(0,))) as engine:
            cache = engine.new_cache()
            model(ids(80), **with_cache(model, cache))
            assert isinstance(cache.layers[0], DynamicLayer)
            assert cache.layers[0].keys.shape[2] == 80
            assert cache.layers[1].blocks.store.length == 80
            assert set(engine.stats.device_bytes) == {1}

    def test_reset_and_reuse(self, tiny_model, ids):
        model = tiny_model()
        with attach(model, CONFIG) as engine:
            cache = engine.new_cache()
            first = model(ids(80), **with_cache(model, cache)).logits
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(model(ids(80), **with_cache(model, cache)).logits, first)

    def test_crop_to_nothing(self, tiny_model, ids):
        model = tiny_model()
        with attach(model, CONFIG) as engine:
            cache = engine.new_cache()
            model(ids(80), **with_cache(model, cache))
            with pytest.raises(ValueError, match="minus"):
                cache.layers[0].crop(3)
            cache.crop(-80)
            assert cache.get_seq_length() == 0

    @torch.no_grad()
    def test_copies_share_nothing(self, tiny_model, ids):
        model = tiny_model()
        with attach(model, CONFIG) as engine:
            cache = engine.new_cache()
            model(ids(80), **with_cache(model, cache))
            twin = copy.deepcopy(cache)
            model(ids(30, seed=1), **with_cache(model, twin))
            assert (cache.get_seq_length(), twin.get_seq_length()) == (80, 110)
            token = ids(1, seed=2)
            again = copy.deepcopy(cache)
            assert torch.equal(
                model(token, **with_cache(model, cache)).logits, model(token, **with_cache(model, again)).logits
            )
            twin.check_integrity()

    @torch.no_grad()
    def test_no_prefill_tensor_outlives_its_step(self, tiny_model, ids):
        """A cycle between a key and its layer would keep a whole prefill alive until the collector runs."""
        model, kept = tiny_model(), []
        gc.disable()
        try:
            with attach(model, CONFIG) as engine:
                cache = engine.new_cache()
                update = cache.layers[0].update

                def watched(*args, **kwargs):
                    key, value = update(*args, **kwargs)
                    kept.extend([weakref.ref(key), weakref.ref(value)])
                    return key, value

                cache.layers[0].update = watched
                model(ids(80), **with_cache(model, cache))
                del cache.layers[0].update
            assert kept
            assert all(one() is None for one in kept)
        finally:
            gc.enable()

    def test_statistics_read_as_a_table(self, tiny_model, ids):
        model = tiny_model()
        config = OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, measure_recovery=1)
        with attach(model, config) as engine:
            model.generate(ids(200), max_new_tokens=12)
        stats = engine.stats
        assert stats.steps == 11  # the first new token comes from the prefill
        assert 0 < stats.recovery <= 1
        assert 0 < stats.relative_recovery <= 1 + 1e-6
        assert 0 < stats.hit_rate <= 1
        assert stats.late_blocks <= 11 * 2 * 2 * 1  # a quarter of four blocks, two layers, two KV heads
        assert stats.full_kv_bytes == 2 * 2 * 2 * 211 * 8 * 4
        for word in ("hit rate", "recovery", "KV on the device", "fetched per token"):
            assert word in str(stats)
        assert stats.to_dict()["device_kv_bytes"] == stats.device_kv_bytes > 0
        stats.reset()
        assert stats.steps == 0
        assert stats.device_kv_bytes > 0


def test_codes_that_save_nothing_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="saves nothing in layer 0: a block of 1 tokens takes"):
        attach(tiny_model().bfloat16(), OffloadConfig(host_kv="int8", block_size=1, predictor="last"))
