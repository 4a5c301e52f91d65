"""Tiny random models of many families."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}

# family: (config class, what it needs beyond _COMMON)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 24}),  # every layer slides: nothing to offload
    "ministral": (
        "MinistralConfig",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 24, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", {}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}

# Of further families: which channels are rotated, in which order, and by whom.
ROTATING: dict[str, tuple[str, dict]] = {
    "cohere2": ("Cohere2Config", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
}

# Of layers and experts of several kinds.
MIXED: dict[str, tuple[str, dict]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 32,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "floor_scale": 64,
            "attn_scale": 0.5,
        },
    ),
}


def make_tiny_model(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    name, extra = (FAMILIES | ROTATING | MIXED)[family]
    config = getattr(transformers, name)(**(_COMMON | extra | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # sharper attention and logits than at initialisation: ties would prove nothing
                parameter.mul_(3.0)
            elif "sinks" in name:
                parameter.normal_()
    model.generation_config.eos_token_id = None
    return model.eval()


# Families of models for text and images: configuration, number of tokens that stand for the image, and its arguments.
_TEXT = _COMMON | {"max_position_embeddings": 512}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE_TOKEN = 90


def _llava() -> tuple[object, int, dict]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=32),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return config, 16, {"pixel_values": torch.randn(1, 3, 16, 16)}


def _gemma3() -> tuple[object, int, dict]:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**_TEXT, **layers, query_pre_attn_scalar=8),
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return config, 4, {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": True}


def _paligemma() -> tuple[object, int, dict]:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**_TEXT),
        vision_config=transformers.SiglipVisionConfig(**_VISION, projection_dim=32, vision_use_head=False),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    return config, 16, {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": True}


def _qwen2_5_vl() -> tuple[object, int, dict]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "in_channels": 3,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    image = {"pixel_values": torch.randn(16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return config, 4, image | {"mm_token_type_ids": True}


def _smolvlm() -> tuple[object, int, dict]:
    config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.SmolVLMVisionConfig(**_VISION),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    return config, 4, {"pixel_values": torch.randn(1, 1, 3, 16, 16)}


WITH_IMAGES = {
    "llava": _llava,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen2_5_vl,
    "smolvlm": _smolvlm,
}


def make_tiny_model_with_image(family: str, tokens: int = 60) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A random model for text and images, and a prompt of so many tokens with an image in it."""
    torch.manual_seed(0)
    config, image_tokens, image = WITH_IMAGES[family]()
    model = transformers.AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 80, (1, tokens))
    ids[0, 5 : 5 + image_tokens] = IMAGE_TOKEN
    kinds = {name: (ids == IMAGE_TOKEN).long() for name, given in image.items() if given is True}
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image | kinds
