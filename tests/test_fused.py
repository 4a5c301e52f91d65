"""A model's small operations by one kernel each, within captured steps. Kernels are emulated here."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from emulated import emulate_steps, emulated_gpu
from torch import Tensor, nn

from attention_predictor import OffloadConfig, attach
from attention_predictor.csrc import ops
from attention_predictor.offload.hf.compiled import CompiledLayers
from attention_predictor.offload.hf.fused.mlp import FusibleMlp
from attention_predictor.offload.hf.fused.modules import FusedModules
from attention_predictor.offload.hf.fused.norm import FusibleNorm
from attention_predictor.offload.hf.fused.rotary import FusibleRotary, _with_global
from attention_predictor.offload.hf.versions import with_cache

SETTINGS = {"budget": 96, "sink": 32, "recent": 32, "slab_blocks": 4, "prefetch": "graph"}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_steps(monkeypatch)


def attached(model, **settings: object):
    """As on a GPU that has the kernels."""
    with emulated_gpu():
        return attach(model, OffloadConfig(**SETTINGS | settings))


@torch.no_grad()
def decode(model, prompt: Tensor, steps: int, **settings: object) -> tuple[Tensor, Tensor, object]:
    """Tokens, their logits and figures of a greedy continuation."""
    with attached(model, **settings) as engine:
        given, logits = with_cache(model, engine.new_cache()), []
        token = prompt
        for _ in range(steps):
            logits.append(model(token, **given).logits[:, -1:])
            token = logits[-1].argmax(-1)
        return torch.cat(logits, 1).argmax(-1), torch.cat(logits, 1), engine.stats


def gpt_neox():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=2, max_position_embeddings=4096)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


FOUND = {
    "llama": "5 norms, 2 MLPs, 2 rotary embeddings",
    "mistral": "5 norms, 2 MLPs, 2 rotary embeddings",
    "qwen3": "9 norms, 2 MLPs, 2 rotary embeddings",
    "phi3": "5 norms, 2 MLPs, 2 rotary embeddings",
    "gemma3": "13 norms, 2 MLPs, 2 rotary embeddings",
    "olmo2": "9 norms, 2 MLPs, 2 rotary embeddings",
    "gpt-neox": "2 rotary embeddings",
}


class TestInSteps:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("family", "dtype"),
        [*((family, torch.float32) for family in FOUND), ("llama", torch.bfloat16), ("gemma3", torch.bfloat16)],
    )
    def test_the_same_tokens_and_logits(self, emulated, tiny_model, ids, family: str, dtype: torch.dtype) -> None:
        whole = {"layer_types": ["full_attention"] * 2} if family == "gemma3" else {}
        model = (gpt_neox() if family == "gpt-neox" else tiny_model(family, **whole)).to(dtype)
        prompt = ids(150, batch=2)
        fused, logits, stats = decode(model, prompt, 6)
        plain, others, without = decode(model, prompt, 6, unfused=True)
        assert stats.fused == FOUND[family]
        assert stats.captured_steps == without.captured_steps > 3
        assert "fused" in str(stats)
        assert without.fused == ""
        assert torch.equal(fused, plain)
        if dtype == torch.float32:
            torch.testing.assert_close(logits, others, atol=1e-5, rtol=1e-5)
        else:  # bit for bit, but for sums in another order
            assert (logits != others).double().mean() < 0.02

    def test_nothing_is_seen_of_it_outside(self, emulated, tiny_model, ids) -> None:
        model, inside = tiny_model("llama"), []
        stock = {name: set(vars(module)) for name, module in model.named_modules()}
        layer = model.model.layers[0]
        forward = type(layer).forward

        def watching(self, *args, **kwargs):
            inside.append(["forward" in vars(module) for module in (layer.mlp, layer.input_layernorm, layer.self_attn)])
            return forward(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, attached(model) as engine, torch.no_grad():
            patch.setattr(type(layer), "forward", watching)
            given, prompt = with_cache(model, engine.new_cache()), ids(150)
            model(prompt, **given)
            model(prompt[:, :1], **given)
            assert inside == [[False] * 3] * 2 + [[True] * 3] * 2
            changed = {name for name, module in model.named_modules() if set(vars(module)) != stock[name]}
            assert changed == {"", "model"}  # what attaching sets
            twin = copy.deepcopy(model)
        assert {name: set(vars(module)) for name, module in twin.named_modules()} == stock
        assert {name: set(vars(module)) for name, module in model.named_modules()} == stock

    def test_a_step_that_fails_restores_all(self, emulated, tiny_model, ids) -> None:
        model, prompt = tiny_model("llama"), ids(150)
        with attached(model) as engine, torch.no_grad():
            given = with_cache(model, engine.new_cache())
            model(prompt, **given)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nn.Linear, "forward", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
                with pytest.raises(KeyboardInterrupt):
                    model(prompt[:, :1], **given)
            assert not any("forward" in vars(module) for module in model.model.layers.modules())

    @pytest.mark.parametrize("settings", [{"kernels": "none"}, {"unfused": True}, {"compile": True}])
    def test_what_turns_it_off(self, tiny_model, settings: dict) -> None:
        """Compiled layers come first."""
        with attached(tiny_model("llama"), **settings) as engine:
            assert engine.stats.fused == ""
            step_modules = engine.captured.step_modules
            assert isinstance(step_modules, CompiledLayers) if "compile" in settings else step_modules is None

    def test_a_cpu_has_none(self, tiny_model) -> None:
        with attach(tiny_model("llama"), OffloadConfig(**SETTINGS)) as engine:
            assert engine.stats.fused == ""


class TestLeftAlone:
    """What was recognised, but is no longer what it was."""

    @pytest.fixture
    def model(self, tiny_model):
        return tiny_model("llama")

    def changed(self, model) -> set[str]:
        """Modules that get a forward."""
        with self.modules:
            return {name for name, module in model.named_modules() if "forward" in vars(module)}

    @pytest.fixture(autouse=True)
    def _found(self, model) -> None:
        with emulated_gpu():
            self.modules = FusedModules(model.model)
        assert len(self.changed(model)) == 9

    def test_hooks_and_forwards_of_their_own(self, model) -> None:
        layer = model.model.layers[0]
        layer.mlp.register_forward_hook(lambda *a: None)
        own = layer.input_layernorm.forward = layer.input_layernorm.forward
        layer.self_attn.register_forward_pre_hook(lambda *a: None)
        changed = self.changed(model)
        assert len(changed) == 7  # the norm has a forward, which stays
        assert {f"model.layers.0.{name}" for name in ("mlp", "self_attn")}.isdisjoint(changed)
        assert vars(layer.input_layernorm)["forward"] is own

    def test_other_parts(self, model) -> None:
        class Adapter(nn.Linear):
            pass

        model.model.layers[0].mlp.up_proj = Adapter(32, 48, bias=False)
        model.model.layers[1].mlp.act_fn = nn.GELU()
        model.model.norm.weight = nn.Parameter(torch.ones(16))
        assert len(self.changed(model)) == 6
        with emulated_gpu():
            assert len(FusedModules(model.model).found) == 8  # with gelu it is another, the adapter is none

    def test_another_forward_of_the_class(self, model, monkeypatch) -> None:
        mlp = type(model.model.layers[0].mlp)
        own = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda self, x: 2 * own(self, x))
        assert len(self.changed(model)) == 7

    def test_another_function_for_the_rotary_embedding(self, model, monkeypatch) -> None:
        module = transformers.models.llama.modeling_llama
        own = module.apply_rotary_pos_emb
        monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda *args: own(*args))
        assert len(self.changed(model)) == 7

    def test_another_mode(self, model) -> None:
        model.train()
        assert self.changed(model) == set()

    def test_a_failure_on_the_way_in(self, model, monkeypatch) -> None:
        monkeypatch.setattr(FusibleRotary, "forward", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError), self.modules:
            pass
        assert not any("forward" in vars(module) for module in model.modules())

    def test_other_inputs_go_by_the_module(self, model) -> None:
        norm, x = model.model.norm, torch.randn(3, 32)
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            wanted = norm(x.double()), mlp(x)
            with self.modules, emulated_gpu():
                assert torch.equal(norm(x.double()), wanted[0])
                torch.testing.assert_close(mlp(x), wanted[1])


class MeanRMSNorm(nn.Module):
    """Not one: it takes the mean off."""

    def __init__(self, form: str = "") -> None:
        super().__init__()
        self.weight, self.eps, self.form = nn.Parameter(torch.ones(64)), 1e-6, form

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        if self.form == "mean":
            y = y - y.mean(-1, keepdim=True)
        elif self.form == "eps outside":
            return self.weight * (y / (y.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)
        elif self.form == "over heads":
            return self.weight * (y * torch.rsqrt(y.pow(2).mean((-1, -2), keepdim=True) + self.eps)).to(x.dtype)
        elif self.form == "a square too many":
            return self.weight**2 * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, act: nn.Module, order: str = "") -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
        self.act, self.order = act, order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "swapped":
            return self.down_proj(self.gate_proj(x) * self.act(self.up_proj(x)))
        if self.order == "scaled":
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)) * 1.01
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class TestRecognition:
    @pytest.fixture(autouse=True)
    def _kernels(self):
        with emulated_gpu(), torch.no_grad():
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("form", ["", "mean", "eps outside", "over heads", "a square too many"])
    def test_norms(self, dtype: torch.dtype, form: str) -> None:
        """Weights of ones, which would hide what is done with them."""
        found = FusibleNorm.find(MeanRMSNorm(form).to(dtype), {})
        assert (found is not None) is (form == "")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("act", "activation"),
        [
            (nn.SiLU(), ops.Activation.SILU),
            (nn.GELU(), ops.Activation.GELU),
            (nn.GELU("tanh"), ops.Activation.GELU_TANH),
            (nn.ReLU(), None),
            (nn.Mish(), None),
            (nn.PReLU(), None),  # a parameter of its own
        ],
    )
    def test_mlps(self, dtype: torch.dtype, act: nn.Module, activation: ops.Activation | None) -> None:
        found = FusibleMlp.find(Mlp(act).to(dtype), {})
        assert (found._activation if found is not None else None) == activation

    @pytest.mark.parametrize("order", ["swapped", "scaled"])
    def test_mlps_of_another_order(self, order: str) -> None:
        assert FusibleMlp.find(Mlp(nn.SiLU(), order), {}) is None

    @pytest.mark.parametrize(
        ("family", "rotates"), [("llama", True), ("phi", True), ("glm", False), ("cohere2", False)]
    )
    def test_rotary_embeddings(self, tiny_model, family: str, rotates: bool) -> None:
        """GLM and Cohere turn each element with its neighbour."""
        found = FusibleRotary.find(tiny_model(family).model.layers[0].self_attn, {})
        assert (found is not None) is rotates

    def test_a_model_with_nothing_to_fuse_says_so(self) -> None:
        modules = FusedModules(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        assert modules.found == []
        assert str(modules).startswith("nothing: ")

    def test_random_numbers_and_modules_stay_as_they_are(self, tiny_model) -> None:
        model = tiny_model("qwen3")
        state, weights = torch.get_rng_state(), {name: x.clone() for name, x in model.state_dict().items()}
        FusedModules(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def outer(x: int, *, y: int = 1) -> int:
    return named(x) + y  # noqa: F821 (a global that the test gives)


def test_a_global_is_exchanged_through_wrappers_that_stay() -> None:
    seen = []

    def wrapper(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            seen.append(args)
            return function(*args, **kwargs)

        return wrapped

    wrapped = wrapper(wrapper(outer))
    copied = _with_global(wrapped, "named", lambda x: 10 * x)
    assert copied(3) == 31
    assert copied(3, y=5) == 35
    assert len(seen) == 4
    assert "named" not in globals()
    assert _with_global(functools.partial(outer), "named", None) is None
