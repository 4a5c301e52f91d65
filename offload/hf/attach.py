"""attach: offload a Hugging Face model's KV cache to CPU memory; refuse unsupported models with one line."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from attention_predictor.csrc import binding, ops
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.errors import AttachError, ConfigError
from attention_predictor.offload.blocks.block_codec import stored_bytes
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.prefetch import make_prefetcher
from attention_predictor.offload.blocks.room import KVShape, Room
from attention_predictor.offload.config import CAPTURING, OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attachment import Attachment, configs_of
from attention_predictor.offload.hf.attention import NAME
from attention_predictor.offload.hf.cache import full_attention_layers
from attention_predictor.offload.hf.compiled import CompiledLayers
from attention_predictor.offload.hf.forwards import Forwards
from attention_predictor.offload.hf.fused.modules import FusedModules
from attention_predictor.offload.hf.graph import CapturedSteps
from attention_predictor.offload.hf.placement import Placement
from attention_predictor.offload.hf.shapes import expected_shapes
from attention_predictor.offload.hf.versions import decoder_layers, layer_config, makes_own_cache
from attention_predictor.offload.hf.warm_up import warm_up
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.allocation import first_budgets
from attention_predictor.offload.policies.predictor import PredictorPolicy
from attention_predictor.offload.ranks import Ranks
from attention_predictor.offload.runtime import Runtime
from attention_predictor.offload.stage import Stage
from attention_predictor.offload.stats import DeviceCounts, Stats
from attention_predictor.predictor.model import AttentionPredictor

ENGINE = "_attention_predictor_engine"  # attribute of an attached model


def attach(model: PreTrainedModel, config: OffloadConfig | None = None) -> Engine:
    """Offload the model's KV cache to host memory.

    ``model.generate(...)``, pipelines and direct calls then use tiered caches, until ``engine.detach()`` or the end of
    the ``with`` block. Only this model object is changed: its configuration names a registered attention
    implementation, and some attributes of the object override methods of its class. Another model needs a configuration
    object of its own.

    Args:
        model: A causal language model of transformers that uses its attention interface. Of a model for images or
            sound only the language model is offloaded. A model wrapped by peft or ``torch.compile`` works too.
        config: Settings; the defaults suit a context of 8K tokens and more.

    Raises:
        AttachError: The model can't be supported (the line says why); it is left as it was.
        ConfigError, CheckpointError: The settings, or the predictor they name, are wrong.
    """
    config = config if config is not None else OffloadConfig()
    if not isinstance(config, OffloadConfig):
        raise ConfigError(f"attach takes an OffloadConfig, got {type(config).__name__}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper calls the model's own forward
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    _check_model(model, config)
    ranks = Ranks.of(model)
    _check_ranks(type(model).__name__, config, ranks)
    with ranks.together():
        placement = Placement.of(model, _decoder(model), _tiered_layers(model, config))
        _check_placement(model, placement, config)
        runtime = _make_runtime(model, config, placement, ranks)
    attachment = Attachment()
    try:
        with ranks.together():
            engine = _install(model, runtime, attachment, placement)
    except BaseException:
        attachment.undo()
        runtime.close()
        raise
    return engine


def _check_ranks(name: str, config: OffloadConfig, ranks: Ranks) -> None:
    if ranks.count > 1 and config.compile:
        raise ConfigError(f"compile=True: {name} is divided among {ranks.count} ranks: expected compile=False")


def _install(model: PreTrainedModel, runtime: Runtime, attachment: Attachment, placement: Placement) -> Engine:
    name, config, decoder = type(model).__name__, runtime.config, _decoder(model)
    for module in {id(one): one for one in (model, model.base_model, decoder)}.values():
        attachment.attribute(module, "__deepcopy__", partial(attachment.copy_of, module))
    if not runtime.tiered_layers:
        runtime.note_fallback(f"{name} has no full-attention layer: nothing is offloaded, it runs as stock")
        engine = Engine(model, runtime, attachment, None)
        attachment.attribute(model, ENGINE, engine)
        runtime.open = True
        return engine
    text_config = runtime.text_config
    attachment.implementations_set_by(
        lambda: decoder.set_attn_implementation(NAME),  # only warns where a model can't
        configs_of(model),
        keep=[decoder.config, text_config],
    )
    if decoder.config._attn_implementation != NAME:
        raise AttachError(
            f"{name} ignores the attention interface: its implementation stayed {decoder.config._attn_implementation!r}"
        )
    for stage in (stage for stage in runtime.stages if stage.device.type == "cuda"):
        if config.uses_kernels:
            ops.prepare(stage.device, _kernels(runtime, decoder.dtype))  # if this fails, layers report why
        warm_up(runtime, stage, decoder.dtype)
    captured, reason = None, policy_class(config.policy).why_never_captured(config)
    asked = config.prefetch == "graph"
    if reason is None and placement.why_not_captured is not None:
        reason, asked = placement.why_not_captured, asked or (config.prefetch in CAPTURING and placement.has_gpu)
    if reason is not None and asked:
        runtime.note_fallback(f"the prefetch thread in place of captured steps: {reason}")
    elif runtime.room.captures or config.prefetch == "graph":
        captured = CapturedSteps(name, model.forward, text_config, runtime, _step_modules(decoder, runtime))
    engine = Engine(model, runtime, attachment, captured)
    Forwards(model, decoder, runtime, attachment, captured).install()
    attachment.attribute(model, ENGINE, engine)
    for method, instead in (
        ("__reduce_ex__", "can't be pickled: detach it first, or use save_pretrained"),
        ("set_attn_implementation", "has its own attention implementation: detach it first"),
        ("init_continuous_batching", "has no place in continuous batching, which keeps a cache of its own: detach it"),
    ):
        if hasattr(model, method):
            attachment.attribute(model, method, _refusal(f"{name}: an attached model {instead}"))
    runtime.open = True
    return engine


def _step_modules(decoder: PreTrainedModel, runtime: Runtime) -> CompiledLayers | FusedModules | None:
    """Compiled layers or fused modules for captured steps, if settings and device allow them."""
    config, device = runtime.config, runtime.device
    if config.compile:
        return CompiledLayers(decoder)
    if (
        config.unfused
        or not config.uses_kernels
        or not binding.on_gpu(device)
        or ops.why_no_kernels(device) is not None
    ):
        return None
    modules = FusedModules(decoder)
    runtime.stats.fused = str(modules)
    return modules if modules.found else None


def _kernels(runtime: Runtime, dtype: torch.dtype) -> list[Kernel]:
    """All kernels that prompts and steps will need, to be compiled in parallel."""
    config, predictor = runtime.config, runtime.stages[0].predictor
    found: dict[str, Kernel] = {}
    for head_dim in {shape.head_dim for shape in runtime.room.shapes.values() if shape is not None}:
        kernels = ops.kernels_of(
            dtype,
            head_dim,
            sketch_bits=config.sketch_bits if predictor is not None and config.needs_sketch else None,
            predictor=None if predictor is None else predictor.arch,
            fused=runtime.room.captures and not (config.compile or config.unfused),
            code_bits=config.code_bits,
        )
        found |= {kernel.name: kernel for kernel in kernels}
    return list(found.values())


def _refusal(message: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AttachError(message)

    return refuse


def _check_codes_save_memory(config: OffloadConfig, shapes: dict[int, KVShape | None]) -> None:
    """``ConfigError`` if a layer's blocks are so small that their codes, with scales, are no smaller."""
    for number, shape in shapes.items():
        if shape is None or config.code_bits is None:
            continue
        block = (config.block_size, shape.head_dim, shape.itemsize)
        coded, plain = stored_bytes(config.code_bits, *block), stored_bytes(None, *block)
        if coded >= plain:
            raise ConfigError(
                f"host_kv={config.host_kv!r} saves nothing in layer {number}: a block of {config.block_size} tokens "
                f"takes {coded} bytes, as it is {plain}; allowed: larger blocks, or host_kv='auto'"
            )


def _layers(model: PreTrainedModel) -> int:
    """Number of layers of the language model: some configurations count others."""
    own = decoder_layers(_decoder(model))
    return len(own) if own is not None else model.config.get_text_config(decoder=True).num_hidden_layers


def _tiered_layers(model: PreTrainedModel, config: OffloadConfig) -> list[int]:
    """Numbers of the layers to offload."""
    count, layers = _layers(model), full_attention_layers(model.config.get_text_config(decoder=True))
    return [number for number in layers if number < count and number not in config.skip_layers]


def _make_runtime(model: PreTrainedModel, config: OffloadConfig, placement: Placement, ranks: Ranks) -> Runtime:
    text_config, layers = model.config.get_text_config(decoder=True), sorted(placement.layers)
    shapes = expected_shapes(model, text_config, layers, model.dtype, ranks)
    _check_codes_save_memory(config, shapes)
    heads = {shape.kv_heads * ranks.parts for shape in shapes.values() if shape is not None}
    budgets = first_budgets(config, len(layers), heads.pop() if len(heads) == 1 else None)
    stats = Stats(prefetch=_prefetch(config, placement), evicts=policy_class(config.policy).evicts)
    devices = list(dict.fromkeys(placement.layers.values()))
    memory = HostMemory([device for device in devices if device.type == "cuda"], limit=config.host_memory)
    captures = config.prefetch in CAPTURING and _why_never_captured(config, placement) is None
    stages = {device: _make_stage(config, device, text_config.num_hidden_layers) for device in devices}
    runtime = Runtime(
        config=config,
        text_config=text_config,
        device=placement.inputs,
        stage_of={number: stages[device] for number, device in placement.layers.items()},
        layers=_layers(model),
        first_budgets=dict(zip(layers, budgets, strict=True)),
        ranks=ranks,
        room=Room(config, memory, shapes, ranks, captures=captures),
        stats=stats,
    )
    memory.note, runtime.room.settle = runtime.note_fallback, runtime.drain
    return runtime


def _make_stage(config: OffloadConfig, device: torch.device, layers: int) -> Stage:
    predictor = None
    if issubclass(policy_class(config.policy), PredictorPolicy):
        predictor = AttentionPredictor.from_pretrained(config.predictor, device=device, block_size=config.block_size)
    return Stage(
        device=device,
        predictor=predictor,
        prefetcher=make_prefetcher(config.prefetch, device),
        counts=DeviceCounts(device, layers),
    )


def _why_never_captured(config: OffloadConfig, placement: Placement) -> str | None:
    """Why no step can be captured with these settings for a model that is placed so; ``None`` if steps can."""
    if reason := policy_class(config.policy).why_never_captured(config) or placement.why_not_captured:
        return reason
    return None if placement.has_gpu else f"steps are captured on a CUDA device, the model is on {placement.inputs}"


def _prefetch(config: OffloadConfig, placement: Placement) -> str:
    """How blocks will be fetched, for ``Stats.prefetch``."""
    if config.prefetch not in CAPTURING:
        return config.prefetch
    reason = _why_never_captured(config, placement)
    return "captured steps, the thread where a step can't be captured" if reason is None else f"thread: {reason}"


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The submodule that has the layers and uses the cache; the model itself if it is unknown."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model


def _check_model(model: PreTrainedModel, config: OffloadConfig) -> None:
    if not isinstance(model, PreTrainedModel):
        raise AttachError(f"attach takes a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if ENGINE in vars(model):
        raise AttachError(f"{name} is already attached: detach its engine first")
    if _decoder(model).config._attn_implementation == NAME:
        raise AttachError(
            f"{name} shares the configuration object of an attached model, or has a copy of it: give it another one, "
            f"whose attention implementation is not {NAME!r}"
        )
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise AttachError(f"{name} is not a causal language model")
    if makes_own_cache(model):
        raise AttachError(f"{name} keeps a cache of its own kind, which is not supported")
    text_config = model.config.get_text_config(decoder=True)
    _check_layers(name, text_config, config)


def _check_layers(name: str, text_config: PreTrainedConfig, config: OffloadConfig) -> None:
    layers = full_attention_layers(text_config)
    for number in layers:
        rank = getattr(layer_config(text_config, number), "kv_lora_rank", None)
        if rank is not None:
            raise AttachError(f"{name} uses multi-head latent attention (kv_lora_rank={rank}): not supported")
    unknown = sorted(set(config.skip_layers) - set(layers))
    if unknown:
        raise ConfigError(f"skip_layers={tuple(config.skip_layers)}: no full-attention layers {unknown} in {name}")
    if layers and not set(layers) - set(config.skip_layers):
        raise ConfigError(f"skip_layers={tuple(config.skip_layers)} leaves no layer to offload")


def _check_placement(model: PreTrainedModel, placement: Placement, config: OffloadConfig) -> None:
    """Refuse what can't be for a model that is placed so."""
    name, reason = type(model).__name__, placement.why_not_captured
    if config.compile and reason is not None:
        raise ConfigError(f"compile=True: {name} has no captured steps, since {reason}: expected compile=False")
    shared = getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    if shared and len(placement.devices) > 1:
        # A shared key that hooks move to another device no longer leads to the layer that has stored it. Which layers
        # share keys depends on the version of transformers, so that all modules count.
        names = ", ".join(sorted(map(str, placement.devices)))
        raise AttachError(f"{name} shares keys among layers, which are on several devices ({names}): not supported")
