"""attach: put the engine under a Hugging Face model, or say in one line why that can't be."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from attention_predictor.offload.attention import NAME
from attention_predictor.offload.cache import full_attention_layers
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.predictor import Predictor
from attention_predictor.predictor.errors import AttachError, ConfigError
from attention_predictor.predictor.model import AttentionPredictor


def attach(model: PreTrainedModel, config: OffloadConfig | None = None) -> Engine:
    """Offload the model's KV cache to host memory.

    From here on ``model.generate(...)``, pipelines and direct calls use tiered caches, until ``engine.detach()`` or
    the end of the ``with`` block. Nothing but this model is changed: its attention implementation is switched to a
    registered one, and one forward pre-hook is installed.

    Args:
        model: Any causal language model of transformers that uses its attention interface.
        config: Settings; the defaults suit a context of 8K tokens and more.

    Raises:
        AttachError: The model can't be supported (the line says why); it is left as it was.
        ConfigError, CheckpointError: The settings, or the predictor they name, are wrong.
    """
    config = config if config is not None else OffloadConfig()
    _check_model(model, config)
    predictor = _load_predictor(model, config)
    configs = _configs(model)
    before = [(one, one._attn_implementation_internal) for one in configs]
    engine = Engine(model, config, predictor)
    engine.remember(before)
    try:
        model.set_attn_implementation(NAME)  # only warns where a model can't
        if engine.text_config._attn_implementation != NAME:
            raise AttachError(
                f"{type(model).__name__} ignores the attention interface: its implementation stayed "
                f"{engine.text_config._attn_implementation!r}"
            )
        engine.hook()
        if not engine.tiered_layers:
            engine.note_fallback(f"{type(model).__name__} has no full-attention layer: nothing is offloaded")
    except BaseException:
        for one, implementation in before:
            one._attn_implementation_internal = implementation
        engine.prefetcher.close()
        raise
    return engine


def _check_model(model: PreTrainedModel, config: OffloadConfig) -> None:
    if not isinstance(model, PreTrainedModel):
        raise AttachError(f"attach takes a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if getattr(model, "_attention_predictor_engine", None) is not None:
        raise AttachError(f"{name} is attached already: detach its engine first")
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise AttachError(f"{name} is not a causal language model")
    text_config = model.config.get_text_config(decoder=True)
    if getattr(text_config, "kv_lora_rank", None) is not None:
        raise AttachError(
            f"{name} uses multi-head latent attention (kv_lora_rank={text_config.kv_lora_rank}): not supported"
        )
    layers = full_attention_layers(text_config)
    unknown = sorted(set(config.skip_layers) - set(layers))
    if unknown:
        raise ConfigError(f"skip_layers={tuple(config.skip_layers)}: no full-attention layers {unknown} in {name}")
    if layers and not set(layers) - set(config.skip_layers):
        raise ConfigError(f"skip_layers={tuple(config.skip_layers)} leaves no layer to offload")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise AttachError(f"{name} is spread over {', '.join(sorted(devices))}: one device is supported")


def _load_predictor(model: PreTrainedModel, config: OffloadConfig) -> AttentionPredictor | None:
    if not issubclass(policy_class(config.policy), Predictor):
        return None
    return AttentionPredictor.from_pretrained(config.predictor, device=model.device, block_size=config.block_size)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config whose attention implementation attaching may change: the model's, its parts' and their parts'."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if config is not None and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                visit(getattr(config, name, None))

    visit(model.config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return list(found.values())
