"""Shapes of models by name, from the models' published config.json."""

from __future__ import annotations

from typing import Any

from attention_predictor.errors import ConfigError


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _llama_3(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "factor": factor}
    return {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_parameters": rope}


# Five of six layers have a window of 1,024 tokens and their own RoPE base; the sixth attends to the whole context.
_GEMMA_3 = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 256,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    },
}
# Every other layer has a window of 128 tokens; attention sinks; 4 of 32 experts are active.
_GPT_OSS = {
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
_QWEN = {"rms_norm_eps": 1e-6} | _rope(1000000.0)
_TINY = {"vocab_size": 512}

# name: (config class of transformers, fields that differ from its defaults); the tiny ones run anywhere
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("LlamaConfig", _llama_3(8.0) | _sizes(4096, 14336, 32, 32, 8, 128)),
    "llama-3.1-70b": ("LlamaConfig", _llama_3(8.0) | _sizes(8192, 28672, 80, 64, 8, 128)),
    "llama-3.2-1b": (
        "LlamaConfig",
        _llama_3(32.0) | _sizes(2048, 8192, 16, 32, 8, 64) | {"tie_word_embeddings": True},
    ),
    "qwen2.5-7b": (
        "Qwen2Config",
        _QWEN
        | {name: size for name, size in _sizes(3584, 18944, 28, 28, 4, 128).items() if name != "head_dim"}
        | {"vocab_size": 152064, "max_position_embeddings": 131072},
    ),
    "qwen3-8b": (
        "Qwen3Config",
        _QWEN | _sizes(4096, 12288, 36, 32, 8, 128) | {"vocab_size": 151936, "max_position_embeddings": 40960},
    ),
    "gemma-3-4b": ("Gemma3TextConfig", _GEMMA_3 | _sizes(2560, 10240, 34, 8, 4, 256)),
    "gemma-3-12b": ("Gemma3TextConfig", _GEMMA_3 | _sizes(3840, 15360, 48, 16, 8, 256)),
    "gpt-oss-20b": ("GptOssConfig", _GPT_OSS | _sizes(2880, 2880, 24, 64, 8, 64)),
    "tiny": (
        "LlamaConfig",
        _TINY | _sizes(128, 256, 2, 4, 2, 64) | {"max_position_embeddings": 131072} | _rope(500000.0),
    ),
    "tiny-gemma-3": (
        "Gemma3TextConfig",
        _GEMMA_3 | _TINY | _sizes(128, 256, 6, 4, 2, 64) | {"sliding_window": 128, "query_pre_attn_scalar": 64},
    ),
    "tiny-gpt-oss": ("GptOssConfig", _GPT_OSS | _TINY | _sizes(128, 64, 4, 4, 2, 64) | {"num_local_experts": 8}),
}


def check_shape(name: str) -> None:
    """Raise ``ConfigError``, listing the names, for an unknown one."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name!r} is not known: expected one of {', '.join(SHAPES)}")
