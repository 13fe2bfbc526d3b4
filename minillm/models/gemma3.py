"""Gemma 3, text (Gemma Team 2025, §2): sandwich norms with weights 1 + w, scaled embeddings, q/k norm, five local
layers to one global layer, each kind with its own rotary base."""

from __future__ import annotations

from minillm.errors import ConfigError
from minillm.models.family import (
    LLAMA_IGNORED,
    LLAMA_WEIGHTS,
    Family,
    Json,
    activation,
    llama_like,
    need,
    rotary,
    windowed_layers,
)
from minillm.transformer.decoder import DecoderConfig, LayerConfig

HEAD_DIM = 256


def _layers(config: Json) -> tuple[LayerConfig, ...]:
    far = rotary(config, theta=1e6, layer_type="full_attention", default_head_dim=HEAD_DIM)
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        near = rotary(config, layer_type="sliding_attention", default_head_dim=HEAD_DIM)
    else:  # before transformers 5: the scaling is the global layers' alone
        local = {"head_dim": config.get("head_dim"), "rope_theta": config.get("rope_local_base_freq", 10000.0)}
        near = rotary(local, default_head_dim=HEAD_DIM)
    window = config.get("sliding_window") or 4096
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return windowed_layers(
        config, LayerConfig(window, near), LayerConfig(None, far), lambda number: (number + 1) % pattern != 0
    )


def translate(config: Json) -> DecoderConfig:
    """config.json of Gemma 3's text models."""
    if config.get("use_bidirectional_attention"):
        raise ConfigError("the model's config sets use_bidirectional_attention: an embedding model, not a generator")
    hidden_size = need(config, "hidden_size")
    return llama_like(
        config,
        layers=_layers(config),
        head_dim=config.get("head_dim") or HEAD_DIM,
        embedding_scale=hidden_size**0.5,
        qk_norm=True,
        attention_scale=(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        attention_soft_cap=config.get("attn_logit_softcapping"),
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        norm_weight_offset=1.0,
        norm_placement="sandwich",
        tied_head=config.get("tie_word_embeddings", True),
        logits_soft_cap=config.get("final_logit_softcapping"),
    )


GEMMA3 = Family(
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    translate=translate,
    prefix="model.",
    weights=LLAMA_WEIGHTS
    | {
        "layers.*.self_attn.q_norm": "layers.*.attention.q_norm",
        "layers.*.self_attn.k_norm": "layers.*.attention.k_norm",
        "layers.*.post_attention_layernorm": "layers.*.attention_norm.out_norm",
        "layers.*.pre_feedforward_layernorm": "layers.*.feed_forward_norm.norm",
        "layers.*.post_feedforward_layernorm": "layers.*.feed_forward_norm.out_norm",
    },
    ignored=LLAMA_IGNORED,
    gguf=("gemma3",),
)
