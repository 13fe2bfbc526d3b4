"""Llama 2 and 3 (Touvron et al. 2023; Llama 3 report 2024), and what shares their form: SmolLM2, TinyLlama, Mistral."""

from __future__ import annotations

from minillm.models.family import (
    LLAMA_IGNORED,
    LLAMA_WEIGHTS,
    Family,
    Json,
    llama_like,
    rotary,
    same_layers,
)
from minillm.transformer.decoder import DecoderConfig, LayerConfig


def translate(config: Json) -> DecoderConfig:
    """config.json of Llama 2 and 3 and their many descendants."""
    return llama_like(
        config,
        layers=same_layers(config, LayerConfig(rotary=rotary(config))),
        feed_forward_bias=bool(config.get("mlp_bias", False)),
    )


def translate_mistral(config: Json) -> DecoderConfig:
    """Mistral 7B (Jiang et al. 2023, §2): every layer looks back over a sliding window; v0.2 and later have none."""
    layer = LayerConfig(window=config.get("sliding_window", 4096), rotary=rotary(config))
    return llama_like(config, layers=same_layers(config, layer))


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    translate=translate,
    prefix="model.",
    weights=LLAMA_WEIGHTS,
    ignored=LLAMA_IGNORED,
    gguf=("llama",),
)

MISTRAL = Family(
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    translate=translate_mistral,
    prefix="model.",
    weights=LLAMA_WEIGHTS,
    ignored=LLAMA_IGNORED,
)
