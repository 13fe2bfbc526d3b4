"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (no biases, RMSNorm on each head's q and k)."""

from __future__ import annotations

from minillm.models.family import LLAMA_IGNORED, LLAMA_WEIGHTS, Family, Json, llama_like, rotary, windowed_layers
from minillm.transformer.decoder import DecoderConfig, LayerConfig


def _layers(config: Json, default_head_dim: int | None = None) -> tuple[LayerConfig, ...]:
    """With ``use_sliding_window``, the layers from number ``max_window_layers`` on look back over a window."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    angles = rotary(config, default_head_dim=default_head_dim)
    return windowed_layers(
        config, LayerConfig(window, angles), LayerConfig(None, angles), lambda number: number >= first
    )


def translate_qwen2(config: Json) -> DecoderConfig:
    """config.json of Qwen2 and Qwen2.5."""
    return llama_like(config, layers=_layers(config), qkv_bias=True, attention_out_bias=False)


def translate_qwen3(config: Json) -> DecoderConfig:
    """config.json of Qwen3."""
    size = config.get("head_dim") or 128
    return llama_like(config, layers=_layers(config, size), head_dim=size, qk_norm=True)


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    translate=translate_qwen2,
    prefix="model.",
    weights=LLAMA_WEIGHTS,
    ignored=LLAMA_IGNORED,
    gguf=("qwen2",),
)

QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    translate=translate_qwen3,
    prefix="model.",
    weights=LLAMA_WEIGHTS
    | {
        "layers.*.self_attn.q_norm": "layers.*.attention.q_norm",
        "layers.*.self_attn.k_norm": "layers.*.attention.k_norm",
    },
    ignored=LLAMA_IGNORED,
    gguf=("qwen3",),
)
